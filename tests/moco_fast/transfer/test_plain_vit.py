from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moco_fast.encoders.encoder import build_backbone
from moco_fast.encoders.formats.base import without_head
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.plain_vit import PlainViT, SimplePyramid
from moco_fast.transfer.presets import PRESETS
from tests.moco_fast.transfer.tiny import TINY, tiny_resnet, tiny_vit

TINY_FPN = replace(TINY, head="fpn", masks=True, anchor_sizes=(8, 16, 32, 64, 128), sides=(64,))


def test_the_map_of_images_of_the_own_size_is_what_the_last_block_gives() -> None:
    backbone = tiny_vit().backbone
    images = torch.randn(2, 3, 64, 64)
    tokens = []
    backbone.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    backbone(images)
    seen = PlainViT(backbone)(images)
    assert seen.shape == (2, 16, 4, 4)
    torch.testing.assert_close(seen, tokens[0][:, 1:].transpose(1, 2).reshape(2, 16, 4, 4))


def test_positions_are_interpolated_to_the_grid_of_each_image() -> None:
    backbone = tiny_vit().backbone
    # Positions that grow with the column, patches that say nothing, and blocks that change nothing.
    with torch.no_grad():
        backbone.patch_embed.proj.weight.zero_()
        backbone.patch_embed.proj.bias.zero_()
        backbone.pos_embed.copy_(torch.cat([torch.zeros(1), torch.arange(4.0).repeat(4)])[None, :, None])
    backbone.blocks = nn.Sequential(nn.Identity())
    seen = PlainViT(backbone)(torch.zeros(1, 3, 90, 128))
    assert seen.shape == (1, 16, 6, 8)
    across = seen[0, 0]
    torch.testing.assert_close(across, across[:1].expand(6, 8))
    # Centers of 8 cells among those of 4, where no bicubic weight reaches beyond the border.
    torch.testing.assert_close(across[0, 3:5], torch.tensor([1.25, 1.75]))
    assert (across[0].diff() > 0).all()


def layers_of_detectron2(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of SimpleFeaturePyramid's stages (modeling/backbone/vit.py of detectron2) by position."""
    finest = {"0": (width, width // 2, 2, 2), "1": (width // 2,), "3": (width // 2, width // 4, 2, 2)}
    before = [finest, {"0": (width, width // 2, 2, 2)}, {}, {}]
    wanted = {}
    for level, (layers, taken, skipped) in enumerate(zip(before, (4, 2, 1, 1), (4, 1, 0, 1), strict=True)):
        wanted |= {f"{level}.{name}": shape for name, shape in layers.items()}
        wanted |= {
            f"{level}.{skipped}": (256, width // taken, 1, 1),
            f"{level}.{skipped + 1}": (256,),
            f"{level}.{skipped + 2}": (256, 256, 3, 3),
            f"{level}.{skipped + 3}": (256,),
        }
    return wanted


def test_the_pyramid_has_the_layers_of_detectron2() -> None:
    with torch.device("meta"):
        detector = build_detector(
            without_head(build_backbone("vit_base"), 768), PRESETS["coco-fpn-1x"], num_classes=80, seed=0
        )
    pyramid = detector.backbone
    assert isinstance(pyramid, SimplePyramid)
    shapes = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in pyramid.levels.named_parameters()
        if name.endswith("weight")
    }
    assert shapes == layers_of_detectron2(768)
    biases = [name for name, value in pyramid.levels.named_parameters() if value.ndim == 1 and "bias" in name]
    # Of three transposed convolutions and nine norms; convolutions that a norm follows have none.
    assert len(biases) == 12
    assert all(value.requires_grad for value in detector.parameters())
    maps = pyramid(torch.zeros(1, 3, 64, 96, device="meta"))
    assert [tuple(each.shape) for each in maps.values()] == [
        (1, 256, -(-64 // stride), -(-96 // stride)) for stride in pyramid.strides
    ]


def test_a_detector_of_a_transformer_trains_all_of_it_and_finds_boxes_and_masks() -> None:
    detector = build_detector(tiny_vit(), TINY_FPN, num_classes=3, seed=0).train()
    images = [torch.randint(0, 256, (3, height, 96), dtype=torch.uint8) for height in (64, 80)]
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    torch.stack(list(detector(images, targets).values())).sum().backward()
    assert [name for name, value in detector.named_parameters() if value.grad is None] == []
    [found] = detector.eval()(images[1:])
    assert found["masks"].shape[1:] == (1, 28, 28)


@pytest.mark.parametrize("head", ["c4", "c5"])
def test_detectors_of_stages_are_not_built_of_a_transformer(head) -> None:
    with pytest.raises(ValueError, match=r"a ResNet's stages, and this is a VisionTransformer; .* a pyramid"):
        build_detector(tiny_vit(), replace(TINY, head=head), num_classes=3, seed=0)


def test_other_networks_and_other_patches_are_refused() -> None:
    other = VisionTransformer(img_size=64, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    for backbone, name in ((other, "VisionTransformer with others"), (tiny_resnet().backbone, "ResNet")):
        with pytest.raises(ValueError, match=f"patches of 16 pixels, and this is a {name}"):
            PlainViT(backbone)
