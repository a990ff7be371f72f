"""Checkpoints of the MoCo authors' code."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from moco_fast.encoders.open import open_encoder
from tests.moco_fast.encoders.layouts import (
    as_if_trained,
    mlp_of_v3,
    pixels,
    resnet_of_authors,
    save_as_authors,
    vit_of_authors,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("head", ["v1", "v2"])
@pytest.mark.parametrize("arch", ["resnet18", None])
@pytest.mark.parametrize("which", ["query", "key"])
def test_v1_and_v2_give_what_torchvision_gives(head: str, arch: str | None, which: str, tmp_path: Path) -> None:
    query, key = resnet_of_authors("resnet18", head), resnet_of_authors("resnet18", head)
    path = save_as_authors(tmp_path / "moco.pth.tar", {"encoder_q": query, "encoder_k": key}, arch)
    opened = open_encoder(str(path), which=which)
    taken, other = (query, "encoder_k") if which == "query" else (key, "encoder_q")
    with torch.no_grad():
        expected = taken(opened.encoder.normalize(pixels()))
        torch.testing.assert_close(opened.encoder(pixels()), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(opened.encoder.features(pixels(), "head"), expected, rtol=1e-5, atol=1e-5)
    assert set(opened.left_out) == {f"{other}.{name}" for name in query.state_dict()} | {"queue", "queue_ptr"}
    assert (opened.encoder.dim, opened.encoder.predictor, opened.config) == (16, None, None)
    assert opened.model is not None
    assert opened.model.encoder == "resnet18"
    assert which in opened.name


def test_a_resnet50_and_a_file_of_before_the_zip_format(tmp_path: Path) -> None:
    query = resnet_of_authors("resnet50", "v2")
    path = save_as_authors(tmp_path / "moco.pth.tar", {"encoder_q": query}, "resnet50")
    content = torch.load(path, weights_only=True)
    # Files of 2018 and before have no number of batches.
    content["state_dict"] = {
        name: tensor for name, tensor in content["state_dict"].items() if not name.endswith("num_batches_tracked")
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    opened = open_encoder(str(path))
    with torch.no_grad():
        expected = query(opened.encoder.normalize(pixels()))
        torch.testing.assert_close(opened.encoder(pixels()), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"no key encoder: nothing in it is called encoder_k\.\*"):
        open_encoder(str(path), which="key")


def test_v3s_resnet_has_its_projector_and_for_queries_its_predictor(tmp_path: Path) -> None:
    base, momentum = resnet_of_authors("resnet18", "v3"), resnet_of_authors("resnet18", "v3")
    predictor = as_if_trained(mlp_of_v3(2, 16, 32, 16, last_bn=False))
    modules = {"base_encoder": base, "momentum_encoder": momentum, "predictor": predictor}
    path = save_as_authors(tmp_path / "v3.pth.tar", modules, "resnet18", scaler={"scale": 65536.0})
    query, key = (open_encoder(str(path), which=which) for which in ("query", "key"))
    with torch.no_grad():
        normalized = query.encoder.normalize(pixels())
        torch.testing.assert_close(query.encoder(pixels()), predictor(base(normalized)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(query.encoder.features(pixels(), "head"), base(normalized), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(key.encoder(pixels()), momentum(normalized), rtol=1e-5, atol=1e-5)
    assert key.encoder.predictor is None
    assert {name.partition(".")[0] for name in query.left_out} == {"momentum_encoder"}
    assert {name.partition(".")[0] for name in key.left_out} == {"base_encoder", "predictor"}


@pytest.mark.parametrize("arch", ["vit_small", None])
def test_v3s_vit_small_has_12_heads(arch: str | None, tmp_path: Path) -> None:
    base, predictor = vit_of_authors(), as_if_trained(mlp_of_v3(2, 16, 32, 16))
    modules = {"base_encoder": base, "momentum_encoder": base, "predictor": predictor}
    path = save_as_authors(tmp_path / "vit.pth.tar", modules, arch)
    opened = open_encoder(str(path))
    images = pixels(224)
    with torch.no_grad():
        projected = base(opened.encoder.normalize(images))
        torch.testing.assert_close(opened.encoder.features(images, "head"), projected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(opened.encoder(images), predictor(projected), rtol=1e-5, atol=1e-5)
    assert opened.model is not None
    assert opened.model.encoder == "vit_small"
    with pytest.raises(ValueError, match="its ViT-S has 12 heads, timm's has 6"):
        open_encoder(f"timm:vit_small_patch16_224@{path}")


def test_v3s_vit_base_is_told_by_its_width(tmp_path: Path) -> None:
    base = vit_of_authors(768)
    path = save_as_authors(tmp_path / "vit.pth.tar", {"base_encoder": base}, None)
    opened = open_encoder(str(path))
    with torch.no_grad():
        expected = base(opened.encoder.normalize(pixels(224)))
        torch.testing.assert_close(opened.encoder(pixels(224)), expected, rtol=1e-5, atol=1e-5)


def test_a_transformer_takes_images_of_another_size(tmp_path: Path) -> None:
    path = save_as_authors(tmp_path / "vit.pth.tar", {"base_encoder": vit_of_authors()}, "vit_small")
    native, small = open_encoder(str(path)), open_encoder(str(path), image_size=96)
    assert (native.encoder.image_size, small.encoder.image_size) == (224, 96)
    assert small.encoder.features(pixels(96), "backbone").shape == (2, 384)
    assert small.digest != native.digest
    with pytest.raises(ValueError, match="patches of 16 pixels, and 100 is not a multiple"):
        open_encoder(str(path), image_size=100)


def test_a_file_without_head_has_a_stand_in(tmp_path: Path) -> None:
    query = resnet_of_authors("resnet18", "v1")
    query.fc = nn.Identity()
    path = save_as_authors(tmp_path / "moco.pth.tar", {"encoder_q": query}, "resnet18")
    encoder = open_encoder(str(path)).encoder
    with torch.no_grad():
        expected = query(encoder.normalize(pixels()))
        torch.testing.assert_close(encoder.features(pixels(), "backbone"), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(pixels()), expected, rtol=1e-5, atol=1e-5)


def _without(network: nn.Module, name: str) -> nn.Module:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return network


def _with(network: nn.Module, name: str) -> nn.Module:
    network.add_module(name, nn.Linear(3, 3))
    return network


@pytest.mark.parametrize(
    ("change", "arch", "says"),
    [
        (
            lambda network: _without(network, "layer3.0.conv2"),
            "resnet18",
            r"it lacks backbone\.layer3\.0\.conv2\.weight",
        ),
        (
            lambda network: _with(network, "extra"),
            "resnet18",
            r"it has more backbone\.extra\.weight, backbone\.extra\.bias",
        ),
        (lambda network: network, "resnet50", r"it lacks backbone\.layer1\.0\.conv3\.weight.*of other shapes are"),
        (lambda network: network, "vit_small", r"it lacks backbone\.cls_token, .*and \d+ more"),
        (lambda network: network, "alexnet", "says that it is of a alexnet, but known are resnet18"),
        (
            lambda network: _without(network, "layer3.0.conv2"),
            None,
            r"the nearest, resnet18: it lacks layer3\.0\.conv2\.weight",
        ),
        (
            lambda network: _without(network, "fc.0"),
            "resnet18",
            r"linear layers and batch norms in v3, but this one has 2\.weight, 2\.bias",
        ),
    ],
)
def test_what_is_not_whole_or_of_another_network_is_refused(
    change: object, arch: str | None, says: str, tmp_path: Path
) -> None:
    network = change(resnet_of_authors("resnet18", "v2"))
    path = save_as_authors(tmp_path / "moco.pth.tar", {"encoder_q": network}, arch)
    with pytest.raises(ValueError, match=says):
        open_encoder(str(path))


def test_v3_with_the_head_of_v1_is_refused(tmp_path: Path) -> None:
    path = save_as_authors(tmp_path / "moco.pth.tar", {"base_encoder": resnet_of_authors("resnet18", "v1")}, "resnet18")
    with pytest.raises(ValueError, match=r"batch norms in v3, but this one has weight, bias"):
        open_encoder(str(path))


def test_the_convolutional_stem_of_v3_is_refused(tmp_path: Path) -> None:
    vit = vit_of_authors()
    vit.patch_embed["proj"] = nn.Sequential(nn.Conv2d(3, 48, 3, stride=2), nn.BatchNorm2d(48))
    path = save_as_authors(tmp_path / "vit.pth.tar", {"base_encoder": vit}, "vit_conv_small")
    with pytest.raises(ValueError, match="a transformer with a convolutional stem"):
        open_encoder(str(path))


def test_the_files_of_their_linear_evaluation_are_torchvisions(tmp_path: Path) -> None:
    network = as_if_trained(torchvision.models.resnet18())
    tensors = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(
        {"epoch": 100, "arch": "resnet18", "state_dict": tensors, "best_acc1": torch.tensor(60.6)}, tmp_path / "x"
    )
    opened = open_encoder(str(tmp_path / "x"))
    network.fc = nn.Identity()
    with torch.no_grad():
        expected = network(opened.encoder.normalize(pixels()))
        torch.testing.assert_close(opened.encoder(pixels()), expected, rtol=1e-5, atol=1e-5)
    assert opened.left_out == ("fc.weight", "fc.bias")
