"""Trunks of plain vision transformers: their last map, and a simple feature pyramid of it (Li et al. 2022, ViTDet)."""

from collections import OrderedDict
from typing import Any

from timm.layers.format import Format
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

__all__ = ["PlainViT", "SimplePyramid"]

_PATCH = 16
_WIDTH = 256


class PlainViT(nn.Module):
    """Vision transformer for images of any size, up to its last block, which its last normalization does not follow.

    Its positions are interpolated to each image's grid of patches. Attention is global in every block, where ViTDet has
    windows in most; class and register tokens take part in it as in pretraining.

    Args:
        backbone: timm's, with patches of 16 pixels; it is changed.

    Raises:
        ValueError: it is another network, or has other patches.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        # Kinds of it have tokens and layers of their own.
        if type(backbone) is not VisionTransformer or backbone.patch_embed.patch_size != (_PATCH, _PATCH):
            raise ValueError(
                f"this network is built of ResNets and of plain vision transformers with patches of {_PATCH} pixels, "
                f"and this is a {_described(backbone)}"
            )
        for unused in ("norm", "fc_norm", "attn_pool", "head"):
            setattr(backbone, unused, nn.Identity())
        patches = backbone.patch_embed
        patches.flatten, patches.output_fmt = False, Format.NHWC
        patches.strict_img_size, patches.dynamic_img_pad = False, True
        backbone.dynamic_img_size = True
        self.vit = backbone
        self.out_channels, self.stride = backbone.embed_dim, _PATCH

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what the map covers: images are filled up to whole patches, below and right."""
        return -height // _PATCH * -_PATCH, -width // _PATCH * -_PATCH

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalized -> (B, out_channels, H / 16, W / 16), rounded up."""
        maps: Any = self.vit.forward_intermediates(images, indices=1, intermediates_only=True)
        return maps[0]


def _described(backbone: nn.Module) -> str:
    name = type(backbone).__name__
    return f"{name} with others" if isinstance(backbone, VisionTransformer) else name


class SimplePyramid(PlainViT):
    """Maps with strides 4, 8, 16 and 32, all of a transformer's last map, and the coarsest one halved once more.

    Each by transposed convolutions or pooling, then a 1x1 and a 3x3 convolution with layer norm, as in
    `SimpleFeaturePyramid` of facebookresearch/detectron2 (modeling/backbone/vit.py).

    Args:
        backbone: as of `PlainViT`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        width = self.out_channels
        finest = [
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        ]
        scaled = [
            (finest, width // 4),
            ([nn.ConvTranspose2d(width, width // 2, 2, stride=2)], width // 2),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        ]
        self.levels = nn.ModuleList(nn.Sequential(*layers, *_convolutions(channels)) for layers, channels in scaled)
        self.coarsest = LastLevelMaxPool()
        self.out_channels, self.strides = _WIDTH, [4, 8, 16, 32, 64]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":  # pyright: ignore[reportIncompatibleMethodOverride] - several maps
        """(B, C, H, W) normalized, H and W multiples of 32 -> maps "0" to "3" and "pool", 256 channels each."""
        seen = super().forward(images)
        maps = [level(seen) for level in self.levels]
        maps, names = self.coarsest(maps, maps, [str(number) for number in range(len(maps))])
        return OrderedDict(zip(names, maps, strict=True))


def _convolutions(channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for taken, kernel in ((channels, 1), (_WIDTH, 3)):
        conv = nn.Conv2d(taken, _WIDTH, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, LayerNorm2d(_WIDTH)]
    return layers
