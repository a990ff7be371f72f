"""Exporter to detectron2: a ResNet with its names, as the MoCo authors' convert-pretrain-to-detectron2.py writes it."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.config import ModelConfig
from moco_fast.exporters.resnets import ResNetFile, facts_of, pixel_statistics, weights_of

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder

__all__ = ["Detectron2Exporter", "dense_pose_command"]

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


# As their detection/configs/Base-RCNN-C4-BN.yaml, and in the pyramid, whose layers are new.
_FINE_TUNED: dict[str, object] = {
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "TEST.PRECISE_BN.ENABLED": True,
}

# The paper names R50-FPN and the schedule s1x. The configuration of that name has had another head since: detectron2's
# own figures with it are 12 points above those of this one, near which the paper's are.
_DENSE_POSE = "configs/densepose_rcnn_R_50_FPN_s1x_legacy.yaml"


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
        """Return lines for a detector's configuration, and the command of the paper's dense pose."""
        model = opened.model
        assert model is not None
        settings = _settings(model)
        lines = [f"cfg.MODEL.WEIGHTS = {str(out)!r}"]
        lines += [f"cfg.{name} = {value!r}" for name, value in settings.items() if name not in _FINE_TUNED]
        lines.append(
            "# as the MoCo authors fine-tune it: every stage, with synchronized batch norm, there and in new layers"
        )
        lines += [f"cfg.{name} = {value!r}" for name, value in _FINE_TUNED.items()]
        lines += [
            "# the MoCo paper's dense pose, in projects/DensePose of detectron2's repository:",
            f"# {dense_pose_command(model, out.absolute())}",
        ]
        return "\n".join(lines)


def _settings(model: ModelConfig) -> dict[str, object]:
    """Return what a configuration of detectron2 says of an exported encoder and its fine-tuning, by its keys."""
    depth, groups, width = _NETWORKS[model.encoder]
    mean, std = pixel_statistics(model)
    # detectron2 builds networks of two convolutions per block with this value alone.
    basic = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64} if depth in (18, 34) else {}
    return {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        **basic,
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "INPUT.FORMAT": "RGB",
        **_FINE_TUNED,
    }


def dense_pose_command(model: ModelConfig, weights: Path) -> str:
    """Return the command that trains DensePose R-CNN from exported weights, for a shell."""
    told = {"MODEL.WEIGHTS": str(weights), **_settings(model)}
    words = [word for name, value in told.items() for word in (name, str(value).replace(" ", ""))]
    return shlex.join(["python", "train_net.py", "--config-file", _DENSE_POSE, "--num-gpus", "8", *words])
