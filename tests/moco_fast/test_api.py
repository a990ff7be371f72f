import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moco_fast
from moco_fast.commandline import parse
from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import set_features
from moco_fast.presets import PRESETS
from pipelines.config import DataConfig, ViewsConfig
from shards.sets import open_set
from tests.moco_fast.embedding.written import photos_of_noise


def test_everything_that_is_offered_is_there() -> None:
    for name in moco_fast.__all__:
        assert getattr(moco_fast, name) is not None
        assert name in dir(moco_fast)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = moco_fast.nonsense


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_recipe_is_configured_as_on_the_command_line(recipe: str, packed_demo: Any) -> None:
    shards = str(packed_demo.train)
    words = [recipe, "--data.shards", shards, "--optim.lr", "0.5", "--run.steps", "7", "--data.batch-size", "512"]
    options = {"data.shards": shards, "optim.lr": 0.5, "run.steps": 7, "data.batch-size": 512}
    assert moco_fast.configure(recipe, options) == parse(words)


def test_a_section_is_taken_whole(packed_demo: Any) -> None:
    views = ViewsConfig(size=48)
    config = moco_fast.configure("demo", {"data.shards": str(packed_demo.train), "views": views, "run.samples": None})
    assert config.views is views


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "`data.shards` is not given"),
        ({"data.shards": "nowhere"}, "nowhere has no manifest.json"),
        ({"data.shard": "x"}, "there is no option 'data.shard': 'shard' is not among shards, batch-size"),
        ({"data.shards.x": "x"}, "'shards' is a single value"),
        ({"optim.lr": "0.1"}, "'optim.lr' is '0.1', but must be a number"),
        ({"optim.lr": True}, "'optim.lr' is True"),
        ({"data.batch_size": 2.5}, "must be a whole number"),
        ({"data.backend": "cpu"}, "must be"),
        ({"model.mean": (0.5, 0.5)}, "'model.mean' is"),
        ({"optim.lr": -1}, "--optim.lr is -1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str, packed_demo: Any) -> None:
    if options and "data.shards" not in options:
        options = {"data.shards": str(packed_demo.train)} | options
    with pytest.raises(ValueError, match=says):
        moco_fast.configure("demo", options)
    with pytest.raises(ValueError, match="choose moco-v1"):
        moco_fast.configure("mocco", {})


def test_every_default_has_the_type_of_its_field() -> None:
    from moco_fast.api import _changed

    for _, config in PRESETS.values():
        for section in set(vars(config)) - {"recipe"}:
            for name, value in vars(getattr(config, section)).items():
                if name != "shards":
                    assert _changed(config, [section, name], value, name) == config


def features(encoder: Encoder, shards: Path) -> np.ndarray:
    found = set_features(
        encoder,
        open_set(shards),
        layer="backbone",
        size=32,
        crop=1.0,
        data=DataConfig(shards=str(shards), batch_size=64),
        device=torch.device("cpu"),
    )
    return found.values.numpy()


def test_a_set_of_shards_is_embedded(finished_run: Path, packed_demo: Any) -> None:
    encoder = moco_fast.load_encoder(finished_run)
    assert (encoder.image_size, encoder.crop, encoder.training) == (32, 1.0, False)
    found = moco_fast.embed(encoder, packed_demo.val, device="cpu")
    np.testing.assert_allclose(found.values, features(encoder, packed_demo.val), atol=1e-4)
    assert (len(found), len(found.names), found.values.dtype) == (72, 72, np.float32)
    folders = [Path(name).parent.name for name in found.names]
    assert folders == [found.class_names[label] for label in found.labels]


def test_a_folder_is_embedded_and_what_is_broken_is_named(
    finished_run: Path, packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photos_of_noise(tmp_path / "photos", num=3)
    shutil.copy(images / "0.png", images / "again.png")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = moco_fast.embed(moco_fast.load_encoder(finished_run), images, layer="head", device="cpu")
    assert [Path(name).name for name in found.names] == ["0.png", "1.png", "2.png", "again.png"]
    assert found.values.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, atol=1e-5)
    [(row, similarity), *others] = found.nearest(0, k=3)
    assert (row, round(similarity, 5)) == (3, 1.0)
    assert len(others) == 2
    assert len(found.rejected) == 1
    assert "broken.jpg: damaged" in found.rejected[0]
    # DALI leaves files of its own beside, where it is used for the first time.
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["photos"]


@pytest.mark.parametrize(("target", "place"), [("timm", "encoder"), ("torchvision", "encoder.safetensors")])
def test_an_exported_encoder_is_loaded_as_the_runs(
    target: str, place: str, packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.moco_fast.test_export import save_run

    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18", mean=(0.1, 0.2, 0.3)), size=64)
    written = moco_fast.export(run, target, tmp_path / place)
    ours, theirs = moco_fast.load_encoder(run), moco_fast.load_encoder(written.path)
    assert (theirs.image_size, theirs.crop) == (ours.image_size, ours.crop) == (64, 0.875)
    expected, found = (moco_fast.embed(each, packed_demo.val, device="cpu").values for each in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights of no network that is known by its names alone"):
        moco_fast.load_encoder(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        moco_fast.load_encoder(tmp_path / "nowhere.safetensors")
