"""Exporter to detectron2: a ResNet with its names, as the MoCo authors' convert-pretrain-to-detectron2.py writes it."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.exporters.resnets import ResNetFile, facts_of, pixel_statistics, weights_of

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder

__all__ = ["Detectron2Exporter"]

# Name -> MODEL.RESNETS.DEPTH, NUM_GROUPS, WIDTH_PER_GROUP.
_NETWORKS = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}


class Detectron2Exporter(ResNetFile):
    """File without pickled code whose names detectron2 matches by their suffixes (`matching_heuristics`)."""

    library = "detectron2"

    def networks(self) -> Collection[str]:
        """Return torchvision's ResNets."""
        return _NETWORKS

    def check(self, out: Path) -> None:
        """Accept a .pth file; detectron2 would read .pkl as a pickle."""
        super().check(out)
        if out.suffix != ".pth":
            raise ValueError(
                f"--out {out}: detectron2 chooses the format by the file's extension: name it {out.stem}.pth"
            )

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the file, which holds tensors and text."""
        import torch

        from moco_fast.encoders.formats.detectron2 import to_detectron2

        assert not head
        weights = {to_detectron2(name): tensor for name, tensor in weights_of(opened).items()}
        about = {"__author__": "moco_fast", "matching_heuristics": True, "architecture": facts_of(opened)}
        torch.save({"model": weights, **about}, path)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for a detector's configuration."""
        model = opened.model
        assert model is not None
        depth, groups, width = _NETWORKS[model.encoder]
        mean, std = pixel_statistics(model)
        lines = [
            f"cfg.MODEL.WEIGHTS = {str(out)!r}",
            f"cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = {depth}, False",
            f"cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = {groups}, {width}",
            f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = {mean}, {std}, 'RGB'",
            "# as the MoCo authors fine-tune it: every stage, with synchronized batch norm",
            "cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = 'SyncBN', 0",
        ]
        return "\n".join(lines)
