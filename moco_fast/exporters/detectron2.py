"""Exporter to detectron2: a ResNet by its names, as the MoCo authors' convert-pretrain-to-detectron2.py."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moco_fast.config import ModelConfig
from moco_fast.exporters.base import check_file
from moco_fast.exporters.resnets import facts_of, weights_of, why_no_resnet

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["Detectron2"]

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


class Detectron2:
    """The names that its checkpointer matches by their ends (`matching_heuristics`), in a file without pickled code."""

    place: ClassVar[str] = "encoder.pth"
    has_head: ClassVar[bool] = False

    def why_not(self, model: ModelConfig | None) -> str | None:
        """It has torchvision's ResNets."""
        return why_no_resnet("detectron2", model, tuple(_NETWORKS))

    def check(self, out: Path) -> None:
        """Take a file; its checkpointer reads .pkl as a pickle."""
        check_file(out)
        if out.suffix != ".pth":
            raise ValueError(f"--out {out}: detectron2 tells by the ending how to read a file: name it {out.stem}.pth")

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the file; it holds tensors and text."""
        import torch

        from moco_fast.encoders.formats.detectron2 import to_detectron2

        assert not head
        weights = {to_detectron2(name): tensor for name, tensor in weights_of(opened).items()}
        about = {"__author__": "moco_fast", "matching_heuristics": True, "architecture": facts_of(opened)}
        torch.save({"model": weights, **about}, path)

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load it as one of our own: the library is on no index."""
        from moco_fast.encoders.open import open_encoder

        del opened
        assert not head
        encoder = open_encoder(str(path)).encoder
        return lambda pixels: (encoder.features(pixels, "backbone"),)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Lines of a detector's configuration."""
        model = opened.model
        assert model is not None
        depth, groups, width = _NETWORKS[model.encoder]
        mean, std = ([round(255 * value, 4) for value in values] for values in (model.mean, model.std))
        lines = [
            f"cfg.MODEL.WEIGHTS = {str(out)!r}",
            f"cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = {depth}, False",
            f"cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = {groups}, {width}",
            f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = {mean}, {std}, 'RGB'",
            "# as the MoCo authors fine-tune it: every stage, with synchronized batch norm",
            "cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = 'SyncBN', 0",
        ]
        return "\n".join(lines)
