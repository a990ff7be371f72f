from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import moco_fast
from moco_fast.cli import main
from moco_fast.config import ModelConfig
from moco_fast.transfer.compare import open_inits
from moco_fast.transfer.described import described
from moco_fast.transfer.detecting import find_all
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.presets import SEGMENT_PRESETS
from moco_fast.transfer.programs import export_trained
from moco_fast.transfer.training import Machine
from tests.moco_fast.transfer.tiny import TINY, two_sets

NAMES = ("bus", "car", "cat")
# With random weights nothing would be found above a score of 0.05 by all heads.
PRESETS = {
    "c4": replace(TINY, masks=True, score_threshold=0.01, precise_batches=0),
    "c5": replace(TINY, head="c5", score_threshold=0.01),
    "fpn": replace(TINY, head="fpn", masks=True, anchor_sizes=(16, 24, 32, 48, 64), score_threshold=0.01),
    "pixels": SEGMENT_PRESETS["voc-semantic"],
}


def write(folder: Path, name: str, *, keypoints: tuple[str, ...] = ()) -> Path:
    """The file of a network with random weights, as a training writes it."""
    [init] = open_inits(["random"], network="resnet18_quarter")
    start, preset = init.start(3), PRESETS[name]
    if keypoints:
        preset = replace(preset, keypoints=True)
    network = (
        PixelNetwork(start.encoder, preset, num_classes=3, seed=1)
        if name == "pixels"
        else build_detector(start.encoder, preset, num_classes=3, seed=1, num_keypoints=len(keypoints))
    )
    path = folder / f"{name}.safetensors"
    save_file(network.state_dict(), path, metadata=described(preset, NAMES, keypoints, start))
    return path


def test_a_detector_is_opened_from_its_file_alone_and_finds_the_same(tmp_path) -> None:
    truth = two_sets(tmp_path, train=1, test=2)[1]
    trained = moco_fast.load_trained(write(tmp_path, "c5"))
    assert (trained.class_names, trained.preset) == (NAMES, PRESETS["c5"])
    found, _ = find_all(
        trained.network, truth, trained.preset, Machine(device=torch.device("cpu")), stop=lambda _: None
    )
    for number, image in enumerate(truth.images):
        own = trained.detect(image.path)
        assert len(own.boxes) > 0
        for name in ("boxes", "classes", "scores"):
            np.testing.assert_array_equal(getattr(own, name), getattr(found, name)[found.image == number])
    with pytest.raises(ValueError, match="use `detect`"):
        trained.segment(truth.images[0].path)


def test_masks_are_those_of_the_image(tmp_path) -> None:
    image = two_sets(tmp_path, train=1, test=1)[1].images[0]
    found = moco_fast.load_trained(write(tmp_path, "c4")).detect(str(image.path))
    assert found.masks.shape == (len(found.boxes), image.height, image.width)


def test_pixels_are_named_in_the_size_of_the_image(tmp_path) -> None:
    image = two_sets(tmp_path, train=1, test=1)[1].images[0]
    trained = moco_fast.load_trained(write(tmp_path, "pixels"))
    assert trained.segment(image.path).shape == (image.height, image.width)
    with pytest.raises(ValueError, match="use `segment`"):
        trained.detect(image.path)


def test_normalization_and_stem_are_those_of_the_encoder(tmp_path) -> None:
    [init] = open_inits(["random"], network="resnet18_quarter")
    init.encoder.pixel_scale.mul_(1.5)
    init.encoder.pixel_shift.add_(0.25)
    start = init.start(0)
    network = PixelNetwork(start.encoder, PRESETS["pixels"], num_classes=3, seed=1).eval()
    save_file(network.state_dict(), tmp_path / "a", metadata=described(PRESETS["pixels"], NAMES, (), start))
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(moco_fast.load_trained(tmp_path / "a").network(image), network(image))


def test_what_was_not_trained_here_is_refused(tmp_path, finished_run) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="is not a network that `moco-fast transfer` trained"):
            moco_fast.load_trained(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        moco_fast.load_trained(tmp_path / "nowhere")
    [init] = open_inits(["random"], network="resnet18_quarter")
    start = init.start(0)
    network = PixelNetwork(start.encoder, PRESETS["pixels"], num_classes=3, seed=1)
    told = described(PRESETS["pixels"], NAMES[:2], (), start)
    save_file(network.state_dict(), tmp_path / "b", metadata=told)
    with pytest.raises(ValueError, match=r"has other weights than .* describes \(size mismatch for head"):
        moco_fast.load_trained(tmp_path / "b")
    start = replace(start, model=None)
    save_file(network.state_dict(), tmp_path / "a", metadata=described(PRESETS["pixels"], NAMES, (), start))
    with pytest.raises(ValueError, match="give an encoder of it as `encoder`"):
        moco_fast.load_trained(tmp_path / "a")
    assert moco_fast.load_trained(tmp_path / "a", encoder=init.encoder).class_names == NAMES
    assert init.model == ModelConfig(encoder="resnet18_quarter")


@pytest.mark.parametrize("name", [pytest.param("c4", marks=pytest.mark.slow), "pixels"])
def test_programs_give_what_the_network_gives_on_images_of_any_size(name, tmp_path, capsys) -> None:
    path, out = write(tmp_path, name), tmp_path / "network.pt2"
    assert main(["transfer", "export", str(path), "--out", str(out)]) == 0
    assert "torch.export.load" in capsys.readouterr().out
    network = moco_fast.load_trained(path).network
    image = torch.randint(0, 256, (3, 130, 151), dtype=torch.uint8)
    with torch.no_grad():
        found = torch.export.load(out).module()(image)
        wanted = [network(image[None])[0]] if name == "pixels" else network([image])[0].values()
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.numel() > 0
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_onnx_runs_a_detector_with_masks(tmp_path, capsys) -> None:
    path, out = write(tmp_path, "c4"), tmp_path / "network.onnx"
    assert main(["transfer", "export", str(path), "--format", "onnx", "--out", str(out)]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    image = torch.randint(0, 256, (3, 150, 131), dtype=torch.uint8)
    with torch.no_grad():
        [wanted] = moco_fast.load_trained(path).network([image])
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": image.numpy()})
    for ours, theirs in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    # A pyramid takes a minute and a half; its masks' head is that of c4, as are proposals and boxes of c5.
    [
        pytest.param("c5", "torch-export", marks=pytest.mark.long),
        pytest.param("fpn", "onnx", marks=pytest.mark.long),
        ("pixels", "onnx"),
    ],
)
def test_every_head_is_exported(name, target, tmp_path) -> None:
    _, num_compared = export_trained(write(tmp_path, name), target, tmp_path / "out")
    assert num_compared > 0


def test_a_program_that_gives_something_else_is_not_written(tmp_path, monkeypatch, capsys) -> None:
    from moco_fast.transfer import programs

    path, out = write(tmp_path, "pixels"), tmp_path / "network.pt2"
    plain = programs._read
    monkeypatch.setattr(programs, "_read", lambda *words: lambda image: [plain(*words)(image)[0] * 1.01])
    assert main(["transfer", "export", str(path), "--out", str(out)]) == 2
    assert "gives something else" in capsys.readouterr().err
    assert not out.exists()


def test_one_missing_detection_is_something_else() -> None:
    from moco_fast.transfer.programs import _has_all

    boxes, scores, labels = torch.rand(4, 4), torch.tensor([0.9, 0.5, 0.4, 0.05]), torch.tensor([1, 2, 1, 2])
    whole = (boxes, scores, labels)
    assert _has_all(whole, whole)
    # What is as good as at the limit may be missing; nothing else may.
    assert _has_all([each[:3] for each in whole], whole)
    assert not _has_all([each[1:] for each in whole], whole)
    assert not _has_all((boxes, scores, labels.flip(0)), whole)
    assert not _has_all((boxes + 1, scores, labels), whole)


def test_keypoints_are_not_exported(tmp_path, capsys) -> None:
    path = write(tmp_path, "fpn", keypoints=("nose", "tail"))
    assert moco_fast.load_trained(path).keypoint_names == ("nose", "tail")
    assert main(["transfer", "export", str(path), "--out", str(tmp_path / "a.pt2")]) == 2
    assert "finds keypoints" in capsys.readouterr().err
