"""Networks that name every pixel's class: an encoder's last map with stride 16, and a head that scores its cells."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from moco_fast.encoders.encoder import Encoder
from moco_fast.transfer.pixel_sets import OPEN
from moco_fast.transfer.plain_vit import PlainViT
from moco_fast.transfer.presets import SegmentPreset
from moco_fast.transfer.trunks import DilatedTrunk

__all__ = ["PixelNetwork"]

_WIDTH, _DILATION = 256, 6
# For stride 16; Chen et al. (2017) double them for stride 8, which are torchvision's own.
_ATROUS_RATES = (6, 12, 18)


class PixelNetwork(nn.Module):
    """ResNet with a dilated last stage, or a plain vision transformer, and a head of convolutions on its last map.

    `fcn` is that of MoCo's appendix A.5: two 3x3 convolutions with dilation 6. `deeplabv3` is torchvision's (Chen et
    al. 2017): five branches, three of them dilated, together through two more convolutions.

    Args:
        encoder: whose backbone and normalization of pixels it has; it is copied.
        preset: with the head.
        num_classes: K.
        seed: of the weights that the encoder does not have.

    Raises:
        ValueError: it cannot be built of this encoder.
    """

    def __init__(self, encoder: Encoder, preset: SegmentPreset, *, num_classes: int, seed: int) -> None:
        super().__init__()
        self.pixels = copy.deepcopy(encoder)
        network: Any = self.pixels.backbone
        self.pixels.backbone, self.pixels.head, self.pixels.predictor = nn.Identity(), nn.Identity(), None
        is_transformer = isinstance(network, VisionTransformer)
        self.backbone = PlainViT(network) if is_transformer else DilatedTrunk(network, encoder.channels)
        build = {"fcn": _fcn, "deeplabv3": _deeplabv3}[preset.head]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = build(self.backbone.out_channels, num_classes)
            for layer in self.head.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            score: Any = self.head[-1]
            nn.init.normal_(score.weight, std=0.01)
            nn.init.zeros_(score.bias)
        self.requires_grad_(True)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Name the class of each pixel.

        Args:
            images: (B, 3, H, W) uint8.
            targets: (B, H, W) uint8, `OPEN` where it does not count; in training.

        Returns:
            in training the loss by name, else (B, K, H, W) float32 scores.
        """
        height, width = images.shape[2:]
        scores = self.head(self.backbone(self.pixels.normalize(images))).float()
        covered = self.backbone.covered(height, width)
        scores = F.interpolate(scores, size=covered, mode="bilinear", align_corners=False)[:, :, :height, :width]
        if targets is None:
            return scores
        wanted = targets.long()
        # The mean over the pixels that count; a crop may have none.
        total = F.cross_entropy(scores, wanted, ignore_index=OPEN, reduction="sum")
        return {"loss_pixels": total / (wanted != OPEN).sum().clamp(min=1)}


def _fcn(channels: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for taken in (channels, _WIDTH):
        conv = nn.Conv2d(taken, _WIDTH, 3, padding=_DILATION, dilation=_DILATION, bias=False)
        layers += [conv, nn.BatchNorm2d(_WIDTH), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(_WIDTH, num_classes, 1))


def _deeplabv3(channels: int, num_classes: int) -> nn.Sequential:
    return DeepLabHead(channels, num_classes, _ATROUS_RATES)
