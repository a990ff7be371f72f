"""Opening encoders: what is there says what it is, and what is not known is refused with what was seen."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moco_fast
from moco_fast import checkpoint
from moco_fast.config import ModelConfig, to_dict
from moco_fast.encoders.encoder import build_encoder
from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, digest_of, opened, without_head
from moco_fast.encoders.formats.registry import FORMATS
from moco_fast.encoders.open import open_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from tests.moco_fast.encoders.layouts import as_if_trained, pixels


def test_a_run_is_opened_with_its_configuration(finished_run: Path) -> None:
    found = open_encoder(str(finished_run))
    config, expected = checkpoint.load_encoder(finished_run)
    assert found.config == config
    assert found.model == config.model
    assert torch.equal(found.encoder(pixels(32)), expected(pixels(32)))
    (folder,) = (finished_run / "checkpoints").iterdir()
    digests = {open_encoder(str(each)).digest for each in (finished_run, folder, folder / "model.safetensors")}
    assert digests == {found.digest}
    with pytest.raises(ValueError, match="holds no key encoder: momentum-contrast has none"):
        open_encoder(str(finished_run), which="key")


def test_a_runs_key_encoder_has_no_predictor(tmp_path: Path, finished_run: Path) -> None:
    config = open_encoder(str(finished_run)).config
    assert config is not None
    config = replace(config, method=MomentumContrastV3(dim=8, mlp_dim=16))
    encoders = {name: as_if_trained(build_encoder(config.model, config.method)) for name in ("query", "key")}
    encoders["key"].predictor = None
    model = {
        f"{name}.{key}": tensor for name, encoder in encoders.items() for key, tensor in encoder.state_dict().items()
    }
    saved = checkpoint.Checkpoint(step=1, config=to_dict(config), model=model, optimizer={}, rng={})
    checkpoint.save(tmp_path / "checkpoints", saved, keep=1)
    for which, encoder in encoders.items():
        assert torch.equal(moco_fast.load_encoder(tmp_path, which=which)(pixels(32)), encoder(pixels(32)))


def small_encoder(name: str = "resnet18_quarter", **model: Any) -> Any:
    torch.manual_seed(2)
    return build_encoder(ModelConfig(encoder=name, **model), MomentumContrast(dim=8)).eval()


def test_a_digest_says_weights_architecture_and_normalization() -> None:
    digest = digest_of(small_encoder())
    assert digest == digest_of(small_encoder())
    changed = small_encoder()
    with torch.no_grad():
        next(changed.head.parameters())[0, 0] += 1e-3
    strided = small_encoder()
    strided.backbone.maxpool.stride = 1
    others = [changed, strided, small_encoder(mean=(0.5, 0.5, 0.5)), small_encoder(std=(0.5, 0.5, 0.5))]
    assert len({digest, *map(digest_of, others)}) == 5
    assert digest_of(small_encoder().train()) == digest


def test_a_digest_tells_heads_apart_that_no_tensor_shows() -> None:
    six, twelve = (without_head(nn.TransformerEncoderLayer(24, heads, batch_first=True), 24) for heads in (6, 12))
    twelve.load_state_dict(six.state_dict())
    assert digest_of(six) != digest_of(twelve)


def test_a_digest_is_the_same_in_another_process(finished_run: Path) -> None:
    code = f"from moco_fast.encoders.open import open_encoder; print(open_encoder({str(finished_run)!r}).digest)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == open_encoder(str(finished_run)).digest


def test_what_the_caller_draws_does_not_change(finished_run: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    open_encoder(str(finished_run))
    assert torch.equal(torch.rand(1), expected)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


TENSORS = {"a": torch.zeros(2), "b.c": torch.zeros(3)}


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_file_is_run(zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, says in (
        (Evil(), "more than weights: print"),
        (argparse.Namespace(), r"weights: argparse\.Namespace"),
    ):
        path = tmp_path / "file.pth"
        torch.save({"state_dict": TENSORS, "x": content}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=says):
            open_encoder(str(path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "before", "safetensors"])
def test_a_file_that_is_cut_off_is_refused(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"a": torch.zeros(1000)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    cut(path, share)
    with pytest.raises(ValueError, match="cannot be read"):
        open_encoder(str(path))


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"<html>not found</html>", b"PK\3\4nothing", b"\x80\x02nothing"])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        open_encoder(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (TENSORS, r"holds 2 tensors: a, b\.c\. These are weights of no network that is known by its names alone"),
        ({"state_dict": TENSORS, "epoch": 3}, r"holds 2 tensors: a, b\.c\."),
        ({"student": TENSORS, "teacher": TENSORS}, r"several sets of weights \(student, teacher\)"),
        ({"epoch": 3, "loss": 0.5}, "no weights by name: its entries are epoch, loss"),
        ([torch.zeros(2)], "holds a list, not weights by name"),
        ({"state_dict": {f"layer.{n}": torch.zeros(1) for n in range(9)}}, r"layer\.5 and 3 more"),
    ],
)
def test_weights_that_are_not_known_are_refused_with_their_names(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=says):
        open_encoder(str(tmp_path / "file"))


def test_a_place_where_nothing_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a run's folder"):
        open_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is empty"):
        open_encoder(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        open_encoder(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="there is no library 'keras'"):
        open_encoder("keras:resnet50")


class Toy:
    """Files with one tensor `a`."""

    def takes(self, place: Place) -> bool:
        return place.is_file and "a" in place.weights.tensors

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return opened(
            without_head(backbone, 3), place.where, f"toy {place.where}", left_out=tuple(place.weights.tensors)
        )


def test_a_format_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", f"{__name__}:Toy")
    torch.save(TENSORS, tmp_path / "file")
    found = open_encoder(str(tmp_path / "file"))
    assert (found.name, found.left_out) == (f"toy {tmp_path / 'file'}", ("a", "b.c"))
    monkeypatch.setitem(FORMATS, "other", f"{__name__}:Toy")
    with pytest.raises(ValueError, match=r"That may be of toy or of other: say which"):
        open_encoder(str(tmp_path / "file"))


def test_a_folder_whose_config_is_no_object_is_refused(tmp_path: Path) -> None:
    for text in ("{", json.dumps([1, 2])):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not JSON of an object"):
            open_encoder(str(tmp_path))
