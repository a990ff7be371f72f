"""Classifier that is trained as a whole: a copy of an encoder's backbone, and a linear layer on its features."""

import copy
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from moco_fast.encoders.encoder import Encoder

__all__ = ["BackboneClassifier", "build_classifier", "randomize"]


class BackboneClassifier(nn.Module):
    """Pixels to scores of classes.

    Args:
        encoder: whose backbone it has; pixels are normalized as by the encoder.
        num_classes: C.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> (B, C)."""
        return self.head(self.encoder.features(images, "backbone"))


def build_classifier(
    encoder: Encoder, num_classes: int, *, seed: int, drop_path: float = 0.0, from_scratch: bool = False
) -> BackboneClassifier:
    """Build a classifier on a copy of an encoder, whose parameters are all to be trained; the encoder stays as it is.

    Args:
        encoder: on any device.
        num_classes: C.
        seed: of the classifier's weights, which are drawn from N(0, 0.01); biases are 0.
        drop_path: probability with which the last block of a transformer is left out in training, and the others less
            often (stochastic depth).
        from_scratch: draw the backbone's weights too.

    Raises:
        ValueError: the backbone has no blocks to leave out, or parameters that no one knows how to draw.
    """
    copied = copy.deepcopy(encoder)
    copied.head, copied.predictor = nn.Identity(), None
    if from_scratch:
        randomize(copied.backbone, seed=seed)
    if drop_path:
        _leave_out_blocks(copied.backbone, drop_path)
    model = BackboneClassifier(copied, num_classes)
    # In float32 on the host, so that the weights are the same on every device.
    weight = 0.01 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.zero_()
    return model.requires_grad_(True)


def randomize(backbone: nn.Module, *, seed: int) -> None:
    """Draw the weights of a network again, in place, as they are before any training.

    What training does not change stays: parameters that need no gradient, such as MoCo v3's fixed positions.

    Raises:
        ValueError: a parameter belongs to a module that does not know how to draw it; the network is as it was.
    """
    module: Any = backbone
    device = next((value.device for value in backbone.parameters()), None)
    if device is None:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        backbone.cpu()
        before = {name: value.detach().clone() for name, value in backbone.named_parameters()}
        for value in backbone.parameters():
            value.fill_(torch.nan)  # It shows what is not drawn.
        for each in backbone.modules():
            if hasattr(each, "reset_parameters"):
                each.reset_parameters()  # pyright: ignore[reportCallIssue] - torch's convention, which no type has
            if isinstance(each, nn.Conv2d) and not hasattr(backbone, "patch_embed"):
                # As torchvision's and our ResNets begin.
                nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
        if hasattr(module, "patch_embed") and hasattr(module, "init_weights"):
            module.init_weights()  # Tokens and positions, which belong to no layer.
        not_drawn = {name: value for name, value in backbone.named_parameters() if value.isnan().any()}
        not_drawn |= {name: value for name, value in backbone.named_parameters() if not value.requires_grad}
        # A scale that is one number throughout is what it began with.
        kept = [name for name, value in not_drawn.items() if value.requires_grad and len(before[name].unique()) > 1]
        for name, value in backbone.named_parameters():
            if kept or name in not_drawn:
                value.copy_(before[name])
        backbone.to(device)
    if kept:
        raise ValueError(
            f"the weights of {type(backbone).__name__} cannot be drawn again: nothing says how {kept[0]} begins; name "
            "a network of timm's or torchvision's ResNets with --encoder"
        )


def _leave_out_blocks(backbone: nn.Module, drop_path: float) -> None:
    blocks: Any = getattr(backbone, "blocks", None)
    if blocks is None or not all(hasattr(block, "drop_path1") for block in blocks):
        raise ValueError(
            f"--drop-path {drop_path:g} leaves out blocks of timm's vision transformers, and this backbone is a "
            f"{type(backbone).__name__}: leave the option out"
        )
    for number, block in enumerate(blocks):
        rate = drop_path * number / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
