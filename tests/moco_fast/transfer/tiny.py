"""A ResNet of four narrow blocks, and settings to detect shapes of 20 to 30 pixels; a vision transformer of two."""

from dataclasses import replace
from pathlib import Path

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.formats.base import without_head
from moco_fast.transfer.presets import PRESETS, DetectPreset
from moco_fast.transfer.sets import DetectionSet
from moco_fast.transfer.voc import find_parts, read_voc
from tests.moco_fast.transfer.shapes import COLORS, write_year

TINY = replace(
    PRESETS["voc-c4"],
    train=("VOC2007/trainval",),
    test=("VOC2007/test",),
    batch_size=4,
    steps=6,
    warmup_steps=2,
    sides=(48, 56, 64),
    test_side=64,
    longest=96,
    anchor_sizes=(24,),
    regions=16,
    train_proposals=(200, 40),
    test_proposals=(200, 40),
    precise_batches=2,
)


def tiny_resnet(seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(8, 16, 32, 32), zero_init_last=False)
        return without_head(backbone, 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).eval()


def tiny_vit(seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = VisionTransformer(img_size=64, embed_dim=16, depth=2, num_heads=2, num_classes=0)
        return without_head(backbone, 16).eval()


def two_sets(folder: Path, preset: DetectPreset = TINY, *, train: int, test: int) -> list[DetectionSet]:
    write_year(folder / "VOC2007", {"trainval": train, "test": test})
    parts = [find_parts([str(folder)], names, option="") for names in (preset.train, preset.test)]
    return [read_voc(each, class_names=tuple(COLORS)) for each in parts]
