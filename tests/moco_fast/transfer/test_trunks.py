import pytest
import torch

from moco_fast.encoders.encoder import Encoder, build_backbone, width_of
from moco_fast.encoders.formats.base import without_head
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.presets import PRESETS, SEGMENT_PRESETS

# Of the paper's widths, ours for CPUs, torchvision's, and timm's with other stems, attention and shortcuts.
NETWORKS = (
    *("resnet50", "resnext50_32x8d", "resnet50_w2x", "resnet50_w4x", "resnet18_half"),
    *("resnet18", "wide_resnet50_2", "seresnet18", "resnet26t"),
)
# Their shortcuts or blocks pool.
POOLED = ("resnet26t", "resnet50d", "resnetblur18")
C4, C5, FPN = (PRESETS[name] for name in ("coco-c4-1x", "voc-c5", "coco-fpn-1x"))


def opened(name: str) -> Encoder:
    with torch.device("meta"):
        backbone = build_backbone(name)
        return without_head(backbone, width_of(backbone))


def shapes_of_detector(encoder: Encoder, preset) -> tuple[list[tuple[int, ...]], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the maps of an image of 72 x 100 pixels, of scores of 3 regions, and of their masks."""
    with torch.device("meta"):
        detector = build_detector(encoder, preset, num_classes=20, seed=0)
        maps = detector.backbone(torch.zeros(1, encoder.channels, 72, 100))
        maps = list(maps.values()) if isinstance(maps, dict) else [maps]
        heads = detector.roi_heads
        cells = torch.zeros(3, maps[-1].shape[1], heads.box_roi_pool.cells, heads.box_roi_pool.cells)
        seen = heads.box_head(cells)
        scores, _ = heads.box_predictor(seen)
        assert all(value.requires_grad for value in detector.parameters())
        if heads.mask_predictor is None:
            return [tuple(each.shape) for each in maps], tuple(scores.shape), ()
        if heads.mask_head is not None:
            seen = heads.mask_head(torch.zeros(3, maps[0].shape[1], 14, 14))
        return [tuple(each.shape) for each in maps], tuple(scores.shape), tuple(heads.mask_predictor(seen).shape)


def maps_of(channels: int, *strides: int) -> list[tuple[int, ...]]:
    return [(1, channels, -(-72 // stride), -(-100 // stride)) for stride in strides]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_resnet_becomes_every_network(name) -> None:
    encoder = opened(name)
    before = encoder.feature_dim // 2
    assert shapes_of_detector(encoder, C4) == (maps_of(before, 16), (3, 21), (3, 20, 14, 14))
    assert shapes_of_detector(encoder, FPN) == (maps_of(256, 4, 8, 16, 32, 64), (3, 21), (3, 20, 28, 28))
    if name in POOLED:
        return
    assert shapes_of_detector(encoder, C5) == (maps_of(512, 16), (3, 21), ())
    with torch.device("meta"):
        network = PixelNetwork(encoder, SEGMENT_PRESETS["voc-semantic"], num_classes=21, seed=0).eval()
        assert network.backbone.strides == [4, 8, 16, 16]
        assert network(torch.zeros(2, 3, 33, 50, dtype=torch.uint8)).shape == (2, 21, 33, 50)


@pytest.mark.parametrize("name", POOLED)
def test_a_last_stage_that_pools_is_not_dilated(name) -> None:
    encoder = opened(name)
    with torch.device("meta"), pytest.raises(ValueError, match="pools, so it cannot be dilated"):
        build_detector(encoder, C5, num_classes=20, seed=0)
