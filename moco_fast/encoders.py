"""Image encoders: a backbone by name, a stem for its image size, and a projection head.

A backbone's initial weights are the authors' (torchvision's): He-normal convolutions (fan-out), batch-norm scales of 1
in every block, torch's defaults elsewhere.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moco_fast.config import ModelConfig

__all__ = ["ENCODERS", "Encoder", "build_encoder", "normalize_images", "unit_vectors"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A backbone with pooled features and the head that turns them into queries or keys.

    State dict: `backbone.*`, `head.*` and, for queries under MoCo v3's head, `predictor.*`.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, predictor: nn.Module | None = None, *, feature_dim: int, dim: int
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
        self.feature_dim = feature_dim
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, dim), not normalized."""
        projected = self.head(self.backbone(images))
        return projected if self.predictor is None else self.predictor(projected)


def build_encoder(model: ModelConfig) -> Encoder:
    """A freshly initialized encoder in float32 on the CPU; torch's global generator decides its weights.

    Raises:
        ValueError: an encoder that neither we nor timm know, or one without the stem that was asked for.
    """
    backbone = _build_backbone(model.encoder)
    if model.stem == "cifar":
        _use_cifar_stem(backbone, model.encoder)
    if model.freeze_patch_projection:
        _freeze_patch_projection(backbone, model.encoder)
    feature_dim = int(backbone.num_features)  # pyright: ignore[reportArgumentType] - timm does not declare it
    head, predictor = _build_head(model, feature_dim, is_transformer=isinstance(backbone, VisionTransformer))
    return Encoder(backbone, head, predictor, feature_dim=feature_dim, dim=model.dim)


def _timm_resnet(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, zero_init_last=False, **options)


def _narrow_resnet18(width: int) -> nn.Module:
    # The deep stem is the only one of timm's whose width follows `stem_width` (its output has twice as many channels).
    channels = (width, 2 * width, 4 * width, 8 * width)
    return ResNet(
        BasicBlock,  # pyright: ignore[reportArgumentType] - timm declares another block
        (2, 2, 2, 2),
        num_classes=0,
        channels=channels,
        stem_type="deep",
        stem_width=width // 2,
        zero_init_last=False,
    )


def _moco_vit(name: str, **options: Any) -> nn.Module:
    """A vision transformer as in MoCo v3: fixed 2-d sine-cosine positions, Xavier-uniform weights (its vits.py)."""
    vit = timm.create_model(name, num_classes=0, **options)
    assert isinstance(vit, VisionTransformer)
    assert vit.pos_embed is not None
    positions = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim)
    with torch.no_grad():
        vit.pos_embed.zero_()[0, 1:] = positions
    vit.pos_embed.requires_grad_(False)
    for layer_name, layer in vit.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer_name.endswith("qkv"):
                # Queries, keys and values are three layers that are stored as one.
                bound = math.sqrt(6 / (layer.out_features / 3 + layer.in_features))
                nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
    patches = vit.patch_embed.proj
    bound = math.sqrt(6 / (patches.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(patches.weight, -bound, bound)
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)  # pyright: ignore[reportArgumentType] - may be None elsewhere
    return vit


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _timm_resnet("resnet18"),
    "resnet50": lambda: _timm_resnet("resnet50"),
    "resnext50_32x8d": lambda: _timm_resnet("resnext50_32x4d", base_width=8),
    "resnet50_w2x": lambda: _timm_resnet("resnet50", channels=(128, 256, 512, 1024)),
    "resnet50_w4x": lambda: _timm_resnet("resnet50", channels=(256, 512, 1024, 2048)),
    "vit_small": lambda: _moco_vit("vit_small_patch16_224", num_heads=12),
    "vit_base": lambda: _moco_vit("vit_base_patch16_224"),
    "resnet18_half": lambda: _narrow_resnet18(32),
    "resnet18_quarter": lambda: _narrow_resnet18(16),
}
"""MoCo v1's encoders (24M, 46M, 94M and 375M parameters), its CIFAR demo's ResNet-18, v3's vision transformers, and a
ResNet-18 at half and a quarter of the channels for CPUs. Builders of backbones without a classifier."""


def _build_backbone(name: str) -> nn.Module:
    if name in ENCODERS:
        return ENCODERS[name]()
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(ENCODERS)} or a timm model"
        raise ValueError(f"encoder {name!r} is unknown, so there is nothing to train: {hint}")
    if timm.model_entrypoint(name).__module__ == "timm.models.resnet":
        return _timm_resnet(name)
    return timm.create_model(name, num_classes=0)


def _use_cifar_stem(backbone: nn.Module, name: str) -> None:
    """Put a 3x3 convolution with stride 1 and no pooling in front, as in the authors' CIFAR demo."""
    if not isinstance(backbone, ResNet):
        raise ValueError(f"encoder {name!r} is no ResNet, so it has no CIFAR stem: use the `imagenet` stem or a ResNet")
    # The demo leaves this convolution at torch's default initialization.
    width = int(backbone.bn1.num_features)  # pyright: ignore[reportArgumentType] - timm does not declare it
    backbone.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
    backbone.maxpool = nn.Identity()


def _freeze_patch_projection(backbone: nn.Module, name: str) -> None:
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"encoder {name!r} has no patch projection to freeze: it is no vision transformer")
    backbone.patch_embed.proj.requires_grad_(False)


def _build_head(model: ModelConfig, feature_dim: int, *, is_transformer: bool) -> tuple[nn.Module, nn.Module | None]:
    """The projection, and what comes after it for queries alone."""
    match model.head:
        case "linear":
            return nn.Linear(feature_dim, model.dim), None
        case "mlp":
            hidden = nn.Linear(feature_dim, feature_dim)
            return nn.Sequential(hidden, nn.ReLU(), nn.Linear(feature_dim, model.dim)), None
        case "v3":
            # v3's ResNet has a two-layer projector and no batch norm after the predictor, its transformers one more of
            # each (moco/builder.py).
            hidden = [model.mlp_dim] * (2 if is_transformer else 1)
            projector = _mlp_with_batch_norm([feature_dim, *hidden, model.dim], last_norm=True)
            predictor = _mlp_with_batch_norm([model.dim, model.mlp_dim, model.dim], last_norm=is_transformer)
            return projector, predictor


def _mlp_with_batch_norm(widths: list[int], *, last_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


def unit_vectors(features: Tensor) -> Tensor:
    """Features (B, D) divided by their lengths, in float32 (or float64 if they are).

    Not in half precision, where the length of a short vector rounds to zero and the result is not a number.
    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)))


@lru_cache(maxsize=8)
def _scale_and_shift(device: torch.device, repeats: int) -> tuple[Tensor, Tensor]:
    """What a pixel is multiplied by, and what is then added: (3 * repeats,) each, channels innermost."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (1 / (255 * std)).repeat(repeats).to(device), (-mean / std).repeat(repeats).to(device)


def normalize_images(images: Tensor) -> Tensor:
    """Pixels in 0..255 to ImageNet-normalized values.

    (B, 3, H, W) uint8 -> (B, 3, H, W) float32, in the same memory format.
    """
    if not images.is_contiguous(memory_format=torch.channels_last):
        scale, shift = (values.view(3, 1, 1) for values in _scale_and_shift(images.device, 1))
        return torch.addcmul(shift, images, scale, out=torch.empty_like(images, dtype=torch.float32))
    # As the batch lies in memory, a row of pixels is one run of 3 * W numbers, long enough for vector instructions.
    rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, H, 3 * W), a view
    scale, shift = _scale_and_shift(images.device, images.shape[3])
    # A GPU converts on the way; on a CPU torch is three times as fast when that is a pass of its own.
    values = rows.float() if images.device.type == "cpu" else rows
    normalized = torch.addcmul(shift, values, scale, out=torch.empty_like(values, dtype=torch.float32))
    return normalized.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
