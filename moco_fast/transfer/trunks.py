"""Trunks of detectors: a ResNet's stages as one map or as a pyramid of maps."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

__all__ = ["DilatedTrunk", "Pyramid", "ReducedTrunk", "Trunk"]

_STEM = ("conv1", "bn1", "act1", "maxpool")
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_PYRAMID_CHANNELS = 256


class Trunk(nn.Module):
    """ResNet up to one of its stages, by its own names.

    Args:
        backbone: timm's ResNet.
        channels: of the images.
        num_stages: 3 for C4, 4 for C5.

    Raises:
        ValueError: it is not a ResNet.
    """

    def __init__(self, backbone: nn.Module, channels: int, *, num_stages: int) -> None:
        super().__init__()
        if not all(hasattr(backbone, name) for name in (*_STEM, *_STAGES)):
            raise ValueError(
                f"this network is built of a ResNet's stages, and this is a {type(backbone).__name__}; of a plain "
                "vision transformer, detectors with a pyramid (fpn) and networks that name pixels are built"
            )
        self.steps = (*_STEM, *_STAGES[:num_stages])
        for name in self.steps:
            setattr(self, name, getattr(backbone, name))
        side = 64
        weight = next(self.parameters())
        with torch.no_grad():
            image = torch.zeros(1, channels, side, side, device=weight.device, dtype=weight.dtype)
            maps = self.eval().maps(image)
        self.widths = [int(each.shape[1]) for each in maps]
        """Channels of each stage's map."""
        self.strides = [side // int(each.shape[2]) for each in maps]
        """Pixels per cell of each stage's map."""

    @property
    def out_channels(self) -> int:
        """Channels of the last map."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels per cell of the last map."""
        return self.strides[-1]

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) normalized -> (B, widths[i], H / strides[i], W / strides[i]) of each stage, rounded up."""
        seen = images.contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        for name in self.steps:
            seen = getattr(self, name)(seen)
            if name in _STAGES:
                found.append(seen)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalized -> the last map."""
        return self.maps(images)[-1]


def dilate(stage: nn.Module) -> None:
    """Give a ResNet's stage stride 1 and its 3x3 convolutions dilation 2, in place.

    Raises:
        ValueError: it pools, so that there is another stride than that of convolutions.
    """
    for name, layer in stage.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                layer.dilation = layer.padding = (2, 2)
        elif not [*layer.children()] and getattr(layer, "stride", 1) not in (1, (1, 1)):
            raise ValueError(f"{name} of the last stage pools, so it cannot be dilated: take a ResNet without pooling")


class DilatedTrunk(Trunk):
    """All stages of a ResNet, the last one dilated in place of a stride (RES5_DILATION of detectron2).

    Args:
        backbone: timm's ResNet, whose last stage is changed: stride 1, and 3x3 convolutions with dilation 2.
        channels: of the images.

    Raises:
        ValueError: it is not a ResNet, or its last stage pools.
    """

    def __init__(self, backbone: Any, channels: int) -> None:
        if hasattr(backbone, "layer4"):
            dilate(backbone.layer4)
        super().__init__(backbone, channels, num_stages=4)

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what the map covers, in pixels of the image."""
        return height, width


class ReducedTrunk(DilatedTrunk):
    """ResNet with a dilated last stage, then a 3x3 convolution with batch norm to 512 channels (appendix A.1 of MoCo).

    Arguments as of `DilatedTrunk`.
    """

    def __init__(self, backbone: Any, channels: int) -> None:
        super().__init__(backbone, channels)
        conv = nn.Conv2d(self.out_channels, 512, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.reduce = nn.Sequential(conv, nn.BatchNorm2d(512), nn.ReLU(inplace=True))
        self.widths.append(512)
        self.strides.append(self.stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalized -> (B, 512, H / 16, W / 16)."""
        return self.reduce(super().forward(images))


class Pyramid(Trunk):
    """All stages of a ResNet as a feature pyramid with batch norm, and its coarsest map halved once more.

    Args:
        backbone: timm's ResNet.
        channels: of the images.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__(backbone, channels, num_stages=4)
        self.pyramid = FeaturePyramidNetwork(
            self.widths, _PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.widths = [_PYRAMID_CHANNELS] * 5
        self.strides.append(2 * self.stride)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":  # pyright: ignore[reportIncompatibleMethodOverride] - several maps
        """(B, C, H, W) normalized -> maps "0" to "3" and "pool", 256 channels each."""
        named = OrderedDict((str(number), seen) for number, seen in enumerate(self.maps(images)))
        return self.pyramid(named)
