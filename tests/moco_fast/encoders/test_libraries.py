"""Networks of torchvision and timm: by name, by file, by folder."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from moco_fast.encoders.encoder import TIMM_NETWORKS
from moco_fast.encoders.formats.torchvision import RESNETS, resnet_of
from moco_fast.encoders.open import open_encoder
from tests.moco_fast.encoders.layouts import as_if_trained, pixels


@pytest.fixture(autouse=True)
def _no_network_and_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def same(where: str, network: nn.Module, size: int = 64, **options: Any) -> Any:
    """Open it, hold its features against those of the network, which has no classifier any more."""
    found = open_encoder(where, **options)
    images = pixels(size)
    with torch.no_grad():
        expected = network.eval()(found.encoder.normalize(images))
        torch.testing.assert_close(found.encoder.features(images, "backbone"), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (2, found.encoder.feature_dim)
    return found


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_of_torchvisions_is_told_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    assert resnet_of(network.state_dict(), "a file") == name


@pytest.mark.parametrize("kind", ["torch", "safetensors", "deit"])
def test_a_file_of_a_resnet_is_opened_as_it_is(kind: str, tmp_path: Path) -> None:
    network = as_if_trained(torchvision.models.resnet18(num_classes=5))
    path = tmp_path / "weights"
    tensors = network.state_dict()
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors} if kind == "deit" else tensors, path)
    network.fc = nn.Identity()
    found = same(str(path), network)
    assert set(found.left_out) == {"fc.weight", "fc.bias"}
    assert (found.encoder.image_size, found.encoder.crop) == (224, 0.875)
    assert found.name == f"{path} (torchvision's resnet18)"
    with pytest.raises(ValueError, match="holds one encoder, and no key encoder"):
        open_encoder(str(path), which="key")


def test_half_precision_is_opened_in_float32(tmp_path: Path) -> None:
    network = as_if_trained(torchvision.models.resnet18())
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    torch.save(halves, tmp_path / "weights")
    encoder = open_encoder(str(tmp_path / "weights")).encoder
    assert {tensor.dtype for tensor in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.backbone.conv1.weight, halves["conv1.weight"].float())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 64),
        ("mobilenet_v3_small", 64),
        ("convnext_tiny", 64),
        ("regnet_y_400mf", 64),
        pytest.param("vit_b_16", 224, marks=pytest.mark.slow),
    ],
)
def test_a_network_of_torchvisions_with_a_file(name: str, size: int, tmp_path: Path) -> None:
    network = as_if_trained(torchvision.models.get_model(name))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    last = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = last.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    found = same(f"torchvision:{name}@{tmp_path / 'weights.pth'}", network, size)
    assert set(found.left_out) == {f"{last}.weight", f"{last}.bias"}
    if name == "vit_b_16":
        with pytest.raises(ValueError, match="takes images of 224 pixels alone, not of 96"):
            open_encoder(f"torchvision:{name}@{tmp_path / 'weights.pth'}", image_size=96)


def test_torchvisions_weights_are_those_of_its_cache(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not on this machine .*resnet18-f37072fd.pth.*get_model\('resnet18', weights="
    ):
        open_encoder("torchvision:resnet18")
    network = as_if_trained(torchvision.models.resnet18())
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cached = tmp_path / "torch" / "hub" / "checkpoints" / Path(weights.url).name
    cached.parent.mkdir(parents=True)
    torch.save(network.state_dict(), cached)
    network.fc = nn.Identity()
    found = same("torchvision:resnet18", network)
    assert (found.encoder.image_size, found.encoder.crop) == (224, 0.875)
    assert found.digest == same("torchvision:resnet18.IMAGENET1K_V1", network).digest
    with pytest.raises(ValueError, match="no weights V3 of resnet18: there are IMAGENET1K_V1"):
        open_encoder("torchvision:resnet18.V3")
    with pytest.raises(ValueError, match=r"torchvision has no resnet19; near are .*resnet18"):
        open_encoder("torchvision:resnet19")


def test_timms_weights_are_those_of_its_cache(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not on this machine.*timm\.create_model\('resnet18.a1_in1k', pretrained=True"
    ):
        open_encoder("timm:resnet18.a1_in1k")
    network = as_if_trained(timm.create_model("resnet18"))
    # The layout of huggingface_hub's cache: refs name a commit, snapshots hold its files.
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file(network.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    network.reset_classifier(0)
    found = same("timm:resnet18.a1_in1k", network)
    assert found.digest == same("timm:resnet18", network).digest  # timm's default weights of it
    assert found.encoder.crop == timm.get_pretrained_cfg("resnet18.a1_in1k").crop_pct
    with pytest.raises(ValueError, match=r"no weights resnet18\.x: there are resnet18\.a1_in1k"):
        open_encoder("timm:resnet18.x")
    with pytest.raises(ValueError, match="timm has no resnet18e; near are none"):
        open_encoder("timm:resnet18e")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("seresnet18", 64),
        ("resnet26d", 64),
        ("convnext_atto", 64),
        ("mobilenetv3_small_050", 64),
        ("vit_tiny_patch16_224", 224),
        ("deit_tiny_distilled_patch16_224", 224),
    ],
)
@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_network_of_timms_with_a_file_and_as_a_folder(name: str, size: int, num_classes: int, tmp_path: Path) -> None:
    network = as_if_trained(timm.create_model(name, num_classes=num_classes))
    save_for_hf(network, str(tmp_path / "folder"), safe_serialization=True)
    whole = set(network.state_dict())
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    network.reset_classifier(0)
    by_file = same(f"timm:{name}@{tmp_path / 'weights.pth'}", network, size)
    by_folder = same(str(tmp_path / "folder"), network, size)
    assert by_file.digest == by_folder.digest == open_encoder(str(tmp_path / "folder" / "model.safetensors")).digest
    assert set(by_file.left_out) == set(by_folder.left_out) == whole - set(network.state_dict())
    assert by_folder.model is not None
    assert by_folder.model.encoder == name


def test_a_folder_says_the_number_of_heads(tmp_path: Path) -> None:
    name, options = TIMM_NETWORKS["vit_small"]
    network = as_if_trained(timm.create_model(name, num_classes=0, **options))
    save_for_hf(network, str(tmp_path / "folder"), safe_serialization=True)
    found = same(str(tmp_path / "folder"), network, 224)
    assert found.model is not None
    assert found.model.encoder == "vit_small"
    config = (tmp_path / "folder" / "config.json").read_text()
    assert '"num_heads": 12' in config
    # Weights alone do not say it, and 384 is no multiple of 7.
    (tmp_path / "folder" / "config.json").write_text(config.replace('"num_heads": 12', '"num_heads": 7'))
    with pytest.raises(ValueError, match="does not fit what timm builds"):
        open_encoder(str(tmp_path / "folder"))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights of no network that is known by its names alone: say which it is"):
        open_encoder(str(tmp_path / "weights.pth"))


def _renamed(tensors: Any, old: str, new: str) -> Any:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: {key: tensors[key] for key in tensors if key != "layer2.0.conv1.weight"},
            r"layer2\.0\.conv1\.weight",
        ),
        (lambda tensors: tensors | {"extra.weight": torch.zeros(2)}, r"extra\.weight"),
        (lambda tensors: _renamed(tensors, "layer4", "stage4"), r"layer4\.0\.conv1\.weight"),
        (lambda tensors: tensors | {"bn1.weight": torch.zeros(3)}, r"bn1\.weight"),
    ],
)
def test_missing_and_extra_tensors_are_named(library: str, change: Any, says: str, tmp_path: Path) -> None:
    torch.save(change(torchvision.models.resnet18().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=says):
        open_encoder(f"{library}:resnet18@{tmp_path / 'weights.pth'}")
    if library == "torchvision":
        with pytest.raises(ValueError, match=rf"the nearest, resnet18: .*{says}"):
            open_encoder(str(tmp_path / "weights.pth"))


def test_another_network_than_was_named_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it has more layer1\.2\.conv1\.weight"):
        open_encoder(f"torchvision:resnet18@{tmp_path / 'weights.pth'}")
    with pytest.raises(ValueError, match=r"does not fit what timm builds.*layer1\.2\.conv1\.weight"):
        open_encoder(f"timm:resnet18@{tmp_path / 'weights.pth'}")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("resnet18"), str(tmp_path / "folder"), safe_serialization=True)
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights: there is no model\.safetensors or pytorch_model\.bin"):
        open_encoder(str(tmp_path / "folder"))
