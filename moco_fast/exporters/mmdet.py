"""Exporter to OpenMMLab's detectors: a file of `backbone.*`, as mmpretrain's (its torchvision_to_mmpretrain.py)."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moco_fast.config import ModelConfig
from moco_fast.exporters.base import check_file
from moco_fast.exporters.resnets import facts_of, weights_of, why_no_resnet

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["MMDet"]

# Name -> what configures it; without wide ones, which its ResNet has no option for.
_BACKBONES = {
    "resnet18": "type='ResNet', depth=18",
    "resnet34": "type='ResNet', depth=34",
    "resnet50": "type='ResNet', depth=50",
    "resnet101": "type='ResNet', depth=101",
    "resnet152": "type='ResNet', depth=152",
    "resnext50_32x4d": "type='ResNeXt', depth=50, groups=32, base_width=4",
    "resnext101_32x8d": "type='ResNeXt', depth=101, groups=32, base_width=8",
    "resnext101_64x4d": "type='ResNeXt', depth=101, groups=64, base_width=4",
}


class MMDet:
    """Its ResNet of style `pytorch` has torchvision's names; a checkpoint of a classifier has them below `backbone`."""

    place: ClassVar[str] = "encoder.pth"
    has_head: ClassVar[bool] = False

    def why_not(self, model: ModelConfig | None) -> str | None:
        """It has torchvision's ResNets but the wide ones."""
        return why_no_resnet("mmdet", model, tuple(_BACKBONES))

    def check(self, out: Path) -> None:
        """Take a file."""
        check_file(out)

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the file; it holds tensors and text."""
        import torch

        assert not head
        weights = {f"backbone.{name}": tensor for name, tensor in weights_of(opened).items()}
        torch.save({"state_dict": weights, "architecture": facts_of(opened)}, path)

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load it as one of our own: the library is on no index for this Python."""
        from moco_fast.encoders.open import open_encoder

        del opened
        assert not head
        encoder = open_encoder(str(path)).encoder
        return lambda pixels: (encoder.features(pixels, "backbone"),)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Lines of a detector's configuration."""
        model = opened.model
        assert model is not None
        mean, std = ([round(255 * value, 4) for value in values] for values in (model.mean, model.std))
        lines = [
            "# in the detector's configuration: every stage trained, its batch norms synchronized as MoCo's",
            f"backbone = dict({_BACKBONES[model.encoder]}, style='pytorch', frozen_stages=-1, norm_eval=False,",
            "                norm_cfg=dict(type='SyncBN', requires_grad=True),",
            f"                init_cfg=dict(type='Pretrained', checkpoint={str(out)!r}, prefix='backbone.'))",
            f"data_preprocessor = dict(type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb=True)",
        ]
        return "\n".join(lines)
