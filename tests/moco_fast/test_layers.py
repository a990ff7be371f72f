from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder, build_encoder
from moco_fast.encoders.layers import check_layer, layer_features, layer_shapes
from moco_fast.methods.momentum_contrast import MomentumContrast

STAGES = [f"stage{stage}" for stage in range(1, 6)]


def encoder_of(backbone: nn.Module, dim: int, size: int) -> Encoder:
    return Encoder(backbone, nn.Linear(dim, 3), feature_dim=dim, dim=3, image_size=size).eval()


def images(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_stages_are_those_that_timm_gives(stem) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter", stem=stem), MomentumContrast(dim=8)).eval()
    pixels = images(32)
    with torch.no_grad():
        found = layer_features(encoder, pixels, ["head", "stage3/64", *STAGES, "patches", "backbone"])
        timm_s: Any = encoder.backbone
        maps = timm_s.forward_intermediates(encoder.normalize(pixels), intermediates_only=True)
        expected = {name: each.mean(dim=(2, 3)) for name, each in zip(STAGES, maps, strict=True)}
        assert torch.equal(found["backbone"], encoder.features(pixels, "backbone"))
        assert torch.equal(found["head"], encoder.features(pixels, "head"))
    assert list(found) == ["head", "stage3/64", *STAGES, "patches", "backbone"]
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
    channels, height = maps[2].shape[1:3]
    side = min(int((64 // channels) ** 0.5), height)
    torch.testing.assert_close(found["stage3/64"], nn.functional.adaptive_avg_pool2d(maps[2], side).flatten(1))
    torch.testing.assert_close(found["patches"].mean(dim=1), found["stage5"])
    assert layer_shapes(encoder, list(found), size=32) == {name: tuple(each.shape[1:]) for name, each in found.items()}


def test_the_published_grids_of_a_resnet50_come_out() -> None:
    # POOL_SIZES and POOL_DIMS in multi_pooling.py of open-mmlab/mmselfsup.
    backbone: Any = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    encoder = encoder_of(backbone, 2048, 64)
    shapes = layer_shapes(encoder, [f"{stage}/9216" for stage in STAGES], size=224)
    assert [shape[0] for shape in shapes.values()] == [9216, 9216, 8192, 9216, 8192]


def test_patches_of_a_transformer_are_its_tokens_but_the_class_token() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    encoder, pixels = encoder_of(vit, 192, 32), images(32)
    with torch.no_grad():
        found = layer_features(encoder, pixels, ["backbone", "patches"])
        tokens = vit.forward_features(encoder.normalize(pixels))
    assert found["patches"].shape == (2, 4, 192)
    torch.testing.assert_close(found["patches"], tokens[:, 1:])
    torch.testing.assert_close(found["backbone"], tokens[:, 0])
    with pytest.raises(ValueError, match="not a ResNet, so it has no stage2"):
        layer_features(encoder, pixels, ["stage2"])


def test_the_last_blocks_of_a_transformer_give_their_class_tokens_side_by_side() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=5)
    encoder, pixels = encoder_of(vit, 192, 32), images(32)
    with torch.no_grad():
        found = layer_features(encoder, pixels, ["last4", "patches", "last1", "backbone"])
        theirs = vit.get_intermediate_layers(encoder.normalize(pixels), n=4, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(found["last4"], torch.cat([prefix[:, 0] for _, prefix in theirs], dim=1))
    torch.testing.assert_close(found["last1"], found["backbone"])
    assert layer_shapes(encoder, ["last4"], size=32) == {"last4": (4 * 192,)}
    with pytest.raises(ValueError, match="the encoder has 5 blocks, so it has no last6"):
        layer_features(encoder, pixels, ["last6"])
    averaging = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, class_token=False, global_pool="avg", depth=2
    )
    for other in (averaging, nn.Flatten()):
        with pytest.raises(ValueError, match="not a vision transformer with a class token, so it has no last2"):
            layer_features(encoder_of(other, 192, 32), pixels, ["last2"])


def test_a_layer_that_no_encoder_has_is_refused() -> None:
    for name in ("stage6", "stage0", "stage1/0", "stage1/x", "last0", "last", "fc", ""):
        with pytest.raises(ValueError, match="there is no layer"):
            check_layer(name)
    flat = encoder_of(nn.Flatten(), 3 * 8 * 8, 8)
    with pytest.raises(ValueError, match="neither a vision transformer nor a ResNet"):
        layer_features(flat, images(8), ["patches"])


def test_hooks_are_gone_afterwards() -> None:
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(dim=8))
    layer_features(encoder, images(32), [*STAGES, "patches"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
