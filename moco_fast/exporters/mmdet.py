"""Exporter to OpenMMLab's detectors: a file of `backbone.*`, as mmpretrain's torchvision_to_mmpretrain.py writes it."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.exporters.resnets import ResNetFile, facts_of, pixel_statistics, weights_of

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder

__all__ = ["MMDet"]

# Name -> its configuration; without the wide ones, for which OpenMMLab's ResNet has no option.
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


class MMDet(ResNetFile):
    """File of a classifier's `backbone`; OpenMMLab's ResNet of style `pytorch` has torchvision's names."""

    library = "mmdet"

    def networks(self) -> Collection[str]:
        """Return torchvision's ResNets except the wide ones."""
        return _BACKBONES

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the file, which holds tensors and text."""
        import torch

        assert not head
        weights = {f"backbone.{name}": tensor for name, tensor in weights_of(opened).items()}
        torch.save({"state_dict": weights, "architecture": facts_of(opened)}, path)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for a detector's configuration."""
        model = opened.model
        assert model is not None
        mean, std = pixel_statistics(model)
        lines = [
            "# in the detector's configuration: every stage trained, its batch norms synchronized as MoCo's",
            f"backbone = dict({_BACKBONES[model.encoder]}, style='pytorch', frozen_stages=-1, norm_eval=False,",
            "                norm_cfg=dict(type='SyncBN', requires_grad=True),",
            f"                init_cfg=dict(type='Pretrained', checkpoint={str(out)!r}, prefix='backbone.'))",
            f"data_preprocessor = dict(type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb=True)",
        ]
        return "\n".join(lines)
