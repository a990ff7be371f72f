import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint, load_encoder
from moco_fast.config import Config, ModelConfig, to_dict
from moco_fast.encoders import ENCODERS, build_encoder
from moco_fast.export import _TIMM, _TORCHVISION, export, why_not
from pipelines.config import DataConfig


@pytest.mark.parametrize("name", [*ENCODERS, "resnet34", "convnext_atto"])
def test_timm_can_build_every_encoder_of_ours(name: str) -> None:
    assert why_not(ModelConfig(encoder=name), "timm") is None
    timm_name, options = _TIMM.get(name, (name, {}))
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name)).backbone
        theirs = timm.create_model(timm_name, num_classes=0, **options)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", _TORCHVISION)
def test_torchvision_has_what_we_say(name: str) -> None:
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name)).backbone
        theirs = torchvision.models.get_model(name)
    classifier = {"fc.weight", "fc.bias"}
    assert shapes(ours) == {key: shape for key, shape in shapes(theirs).items() if key not in classifier}


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def save_run(folder: Path, model: ModelConfig) -> Path:
    config = to_dict(Config(data=DataConfig(shards="nowhere"), model=model))
    torch.manual_seed(5)
    query = {f"query.{name}": tensor for name, tensor in build_encoder(model).state_dict().items()}
    saved = Checkpoint(step=7, config=config, model=query, optimizer={}, rng={})
    checkpoint.save(folder / "checkpoints", saved, keep=1)
    return folder


@pytest.mark.parametrize(("encoder", "target"), [("resnet18_quarter", "timm"), ("resnet18", "torchvision")])
def test_the_lines_it_prints_load_the_same_network(encoder: str, target, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder=encoder, dim=8))
    written = export(run, target, tmp_path / "encoder.safetensors")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scope: dict[str, Any] = {}
    exec(written.usage, scope)
    network = scope["model"].eval()
    if target == "torchvision":
        network.fc = torch.nn.Identity()
    _, trained = load_encoder(run)
    with torch.no_grad():
        torch.testing.assert_close(network(images), trained.backbone(images))


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter", dim=8))
    written = export(run, "timm", tmp_path / "encoder.safetensors")
    with safe_open(written.path, framework="pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        names = set(file.keys())
    assert architecture["name"] == "resnet18"
    assert architecture["options"]["stem_width"] == 8
    assert not any(name.startswith(("head", "backbone", "fc")) for name in names)
    assert written.num_parameters == sum(p.numel() for p in load_encoder(run)[1].backbone.parameters())


@pytest.mark.parametrize(
    ("model", "target", "says"),
    [
        (ModelConfig(encoder="resnet18_quarter", stem="cifar", dim=8), "timm", "timm has no .* with a cifar stem"),
        (ModelConfig(encoder="resnet18_quarter", dim=8), "torchvision", "torchvision has no resnet18_quarter"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_nothing_is_written(
    model: ModelConfig, target, says: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match=says):
        export(run, target, tmp_path / "encoder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_encoder_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter", dim=8))
    monkeypatch.setitem(_TIMM, "resnet18_quarter", ("resnet18", {}))
    with pytest.raises(ValueError, match="timm's resnet18 does not take these weights"):
        export(run, "timm", tmp_path / "encoder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter", dim=8))
    with pytest.raises(ValueError, match="there is no folder"):
        export(run, "timm", tmp_path / "nowhere" / "encoder.safetensors")
