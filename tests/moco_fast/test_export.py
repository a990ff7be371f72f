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
from moco_fast.encoders.encoder import ENCODERS, TIMM_NETWORKS, Encoder, build_encoder
from moco_fast.encoders.formats.torchvision import RESNETS
from moco_fast.exporters.registry import EXPORTERS, find_exporter
from moco_fast.exporters.write import export, load_into
from moco_fast.methods.momentum_contrast import MomentumContrast
from pipelines.config import DataConfig, ViewsConfig


@pytest.mark.parametrize("name", [*ENCODERS, "resnet34", "convnext_atto"])
def test_timm_can_build_every_encoder_of_ours(name: str) -> None:
    assert find_exporter("timm").why_not(ModelConfig(encoder=name)) is None
    timm_name, options = TIMM_NETWORKS.get(name, (name, {}))
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name), MomentumContrast()).backbone
        theirs = timm.create_model(timm_name, num_classes=0, **options)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", RESNETS)
def test_torchvision_has_what_we_say(name: str) -> None:
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name), MomentumContrast()).backbone
        theirs = torchvision.models.get_model(name)
    classifier = {"fc.weight", "fc.bias"}
    assert shapes(ours) == {key: shape for key, shape in shapes(theirs).items() if key not in classifier}


METHOD = MomentumContrast(dim=8)


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def save_run(folder: Path, model: ModelConfig, *, size: int = 224) -> Path:
    views = ViewsConfig(size=size)
    config = to_dict(Config(data=DataConfig(shards="nowhere"), model=model, method=METHOD, views=views))
    query = {f"query.{name}": tensor for name, tensor in as_if_trained(build(model)).state_dict().items()}
    saved = Checkpoint(step=7, config=config, model=query, optimizer={}, rng={})
    checkpoint.save(folder / "checkpoints", saved, keep=1)
    return folder


def build(model: ModelConfig) -> Encoder:
    torch.manual_seed(5)
    return build_encoder(model, METHOD)


def as_if_trained(encoder: Encoder) -> Encoder:
    """Other scales and statistics than the first ones, so that no layer is the identity."""
    with torch.no_grad():
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.1)
        for name, buffer in encoder.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return encoder.eval()


# Of those with 94 million parameters and more, the shapes of weights are all that their options change.
LARGE = ("resnet50_w2x", "resnet50_w4x", "resnet152", "resnext101_64x4d", "wide_resnet101_2")
OTHERS = (
    "resnet34",
    "resnet26d",
    "seresnet50",
    "convnext_atto",
    "efficientnet_b0",
    "regnety_002",
    "vit_tiny_patch16_224",
)


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize("name", sorted({*ENCODERS, *RESNETS, *OTHERS} - {*LARGE}))
def test_every_encoder_gives_the_same_features_in_every_library_or_is_refused(name: str, target: str) -> None:
    model = ModelConfig(encoder=name)
    if find_exporter(target).why_not(model):
        assert (target, name in RESNETS) == ("torchvision", False)
        return
    encoder = as_if_trained(build(model))
    network = load_into(find_exporter(target), model, encoder.backbone.state_dict()).eval()
    size = 224 if "vit" in name else 64
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder.features(images, "backbone")
        torch.testing.assert_close(network(encoder.normalize(images)), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3


NORMALIZED = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


@pytest.mark.parametrize(
    ("encoder", "target"), [("resnet18_quarter", "timm"), ("vit_small", "timm"), ("resnet18", "torchvision")]
)
def test_the_lines_it_prints_load_the_same_network(encoder: str, target: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder=encoder, **NORMALIZED))
    written = export(run, target, tmp_path / "encoder")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scope: dict[str, Any] = {}
    exec(written.usage, scope)
    network = scope["model"].eval()
    if target == "torchvision":
        network.fc = torch.nn.Identity()
        normalize = scope["normalize"]
    else:
        data = timm.data.resolve_model_data_config(network)
        normalize = torchvision.transforms.Normalize(mean=data["mean"], std=data["std"])
        assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")
    _, trained = load_encoder(run)
    with torch.no_grad():
        expected = trained.features(images, "backbone")
        torch.testing.assert_close(network(normalize(images / 255)), expected, rtol=1e-4, atol=1e-4)
    assert written.num_parameters == sum(p.numel() for p in trained.backbone.parameters())


def test_a_transformer_of_other_heads_is_not_what_timm_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="vit_small"))
    export(run, "timm", tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["num_heads"]) == ("vit_small_patch16_224", 12)
    monkeypatch.setitem(TIMM_NETWORKS, "vit_small", ("vit_small_patch16_224", {}))
    with pytest.raises(ValueError, match="timm builds another network for these weights"):
        export(run, "timm", tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "run"]


def test_what_is_written_says_what_it_is_and_nothing_of_timms_own_weights(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    export(run, "timm", tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert config["model_args"]["stem_width"] == 8
    assert not {"tag", "license", "origin_url", "paper_ids"} & config["pretrained_cfg"].keys()
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    run = save_run(tmp_path / "other", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, "torchvision", tmp_path / "encoder.safetensors")
    with safe_open(written.path, framework="pt") as file:
        facts = json.loads(file.metadata()["architecture"])
        assert not any(name.startswith(("head", "backbone", "fc")) for name in file.keys())  # noqa: SIM118 - the file has no iterator
    of_pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 64, "crop": 0.875}
    assert facts == {"library": "torchvision", "name": "resnet18", **of_pixels}


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    for _ in range(2):
        export(run, "timm", tmp_path / "encoder")
    (tmp_path / "encoder" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        export(run, "timm", tmp_path / "encoder")
    with pytest.raises(ValueError, match="name a folder"):
        export(run, "timm", tmp_path / "encoder.safetensors")
    other = save_run(tmp_path / "other", ModelConfig(encoder="resnet18"), size=64)
    with pytest.raises(ValueError, match="holds something else"):
        export(other, "torchvision", tmp_path / "encoder")
    assert (tmp_path / "encoder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "target", "says"),
    [
        (ModelConfig(encoder="resnet18_quarter", stem="cifar"), "timm", "timm has no .* with a cifar stem"),
        (ModelConfig(encoder="resnet18_quarter"), "torchvision", "torchvision has no resnet18_quarter"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_nothing_is_written(
    model: ModelConfig, target: str, says: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match=says):
        export(run, target, tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_encoder_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"))
    monkeypatch.setitem(TIMM_NETWORKS, "resnet18_quarter", ("resnet18", {}))
    with pytest.raises(ValueError, match="timm's resnet18 does not take these weights"):
        export(run, "timm", tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_encoder_that_has_diverged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: ModelConfig) -> Encoder:
        encoder = build_encoder(model, METHOD)
        next(encoder.backbone.parameters()).data.fill_(float("nan"))
        return encoder

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "build", poisoned)
        run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    with pytest.raises(ValueError, match="it has diverged"):
        export(run, "timm", tmp_path / "encoder")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"))
    with pytest.raises(ValueError, match="there is no folder"):
        export(run, "timm", tmp_path / "nowhere" / "encoder")


class ToyExporter:
    """A library that takes anything and keeps it as torch does."""

    def why_not(self, model: ModelConfig) -> str | None:
        return None if model.stem == "imagenet" else "toys have one stem"

    def check_place(self, out: Path) -> None:
        assert out.suffix == ".toy"

    def build(self, model: ModelConfig) -> tuple[torch.nn.Module, str]:
        return build_encoder(model, METHOD).backbone, "toy"

    def write(self, network: torch.nn.Module, config: Config, path: Path) -> None:
        torch.save(network.state_dict(), path)

    def read_back(self, model: ModelConfig, path: Path) -> torch.nn.Module:
        network, _ = self.build(model)
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    def usage(self, model: ModelConfig, out: Path) -> str:
        return f"toy.load({str(out)!r})"


def test_an_exporter_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    monkeypatch.setitem(EXPORTERS, "toy", f"{__name__}:ToyExporter")
    written = export(run, "toy", tmp_path / "encoder.toy")
    assert written.usage == f"toy.load({str(tmp_path / 'encoder.toy')!r})"
    assert written.path.stat().st_size > 0
    with pytest.raises(ValueError, match="there is no exporter 'toys': choose timm or torchvision or toy"):
        export(run, "toys", tmp_path / "other.toy")
