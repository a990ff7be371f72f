"""Image encoders: pixels normalized, a backbone by name, a stem for its image size, and a projection head.

A ResNet starts as torchvision's, which the authors use: He-normal convolutions (fan-out), batch-norm scales of 1,
torch's defaults elsewhere. MoCo v3 alone builds it with `zero_init_residual` (its main_moco.py), v1, v2 and the CIFAR
demo without.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moco_fast.config import IMAGENET_MEAN, IMAGENET_STD, Layer, ModelConfig
from moco_fast.methods.base import Method

__all__ = [
    "ENCODERS",
    "TIMM_NETWORKS",
    "Encoder",
    "build_backbone",
    "build_encoder",
    "build_stemmed",
    "check_image_size",
    "sine_cosine_positions",
    "unit_vectors",
    "width_of",
]


class Encoder(nn.Module):
    """A backbone with pooled features and the head that turns them into queries or keys.

    It takes pixels and normalizes them itself, so that whoever uses a trained encoder feeds it as training did.
    State dict: `backbone.*`, `head.*` and, for queries of methods that predict, `predictor.*`.

    Args:
        backbone: normalized images (B, 3, H, W) -> features (B, feature_dim).
        head: features -> (B, dim).
        predictor: (B, dim) -> (B, dim), on top of the head for queries; None: there is none.
        feature_dim: size of the backbone's features.
        dim: size of a query or key.
        mean: of each channel, subtracted from pixels in 0..1.
        std: of each channel, divides what is left.
        image_size: height and width of the images that it is for, in pixels.
        crop: side of the central square that is evaluated, as a share of the shorter side.
        channels: of what the backbone takes; 1: the gray values of the normalized channels.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    gray: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: nn.Module | None = None,
        *,
        feature_dim: int,
        dim: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        image_size: int = 224,
        crop: float = 0.875,
        channels: int = 3,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor
        self.feature_dim = feature_dim
        self.dim = dim
        self.image_size = image_size
        self.crop = crop
        self.channels = channels
        # Not in the state dict: the configuration holds them, and a checkpoint holds the configuration.
        self.register_buffer("pixel_scale", 1 / (255 * torch.tensor(std)), persistent=False)
        self.register_buffer("pixel_shift", -torch.tensor(mean) / torch.tensor(std), persistent=False)
        if channels == 1:
            # ITU-R 601-2, as Pillow and torchvision have it; channels of a gray image differ by one level at most.
            self.register_buffer("gray", torch.tensor((0.299, 0.587, 0.114)), persistent=False)

    def forward(
        self, images: Tensor, *, with_projection: bool = False, with_features: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Pixels (B, 3, H, W) uint8 to (B, dim), not of length 1.

        Args:
            images: pixels.
            with_projection: also give what the head makes, (B, dim).
            with_features: also give what the backbone makes, (B, feature_dim), without gradient.
        """
        features = self.backbone(self.normalize(images))
        projected = self.head(features)
        predicted = projected if self.predictor is None else self.predictor(projected)
        more = (*((projected,) if with_projection else ()), *((features.detach(),) if with_features else ()))
        return (predicted, *more) if more else predicted

    def features(self, images: Tensor, layer: Layer) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to what comes out of a layer: (B, feature_dim) or (B, dim), not of length 1."""
        features = self.backbone(self.normalize(images))
        return features if layer == "backbone" else self.head(features)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels in 0..255 to what the backbone takes: (B, 3, H, W) uint8 -> (B, channels, H, W) float32.

        The memory format stays. Pixels may be of a floating type, too, with gradient.
        """
        normalized = self._normalize(images)
        if self.channels == 3:
            return normalized
        return (normalized * self.gray.view(3, 1, 1)).sum(1, keepdim=True)

    def _normalize(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            return torch.addcmul(self.pixel_shift.view(3, 1, 1), images, self.pixel_scale.view(3, 1, 1))
        dtype = torch.promote_types(images.dtype, self.pixel_scale.dtype)
        if not images.is_contiguous(memory_format=torch.channels_last):
            scale, shift = self.pixel_scale.view(3, 1, 1), self.pixel_shift.view(3, 1, 1)
            return torch.addcmul(shift, images, scale, out=torch.empty_like(images, dtype=dtype))
        # As the batch lies in memory, a row of pixels is one run of 3 * W numbers, long enough for vector instructions.
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, H, 3 * W), a view
        scale, shift = (values.repeat(images.shape[3]) for values in (self.pixel_scale, self.pixel_shift))
        # A GPU converts on the way; on a CPU torch is three times as fast when that is a pass of its own.
        values = rows.to(dtype) if images.device.type == "cpu" else rows
        normalized = torch.addcmul(shift, values, scale, out=torch.empty_like(values, dtype=dtype))
        return normalized.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def build_encoder(model: ModelConfig, method: Method, *, image_size: int = 224, crop: float = 0.875) -> Encoder:
    """Build an encoder in float32 on the CPU, with the method's head; torch's global generator decides its weights.

    Args:
        model: what to build.
        method: whose head it has.
        image_size: see Encoder.
        crop: see Encoder.

    Raises:
        ValueError: an encoder that neither we nor timm know, one that takes no images of this size, or one without the
            stem that was asked for.
    """
    backbone = build_stemmed(model, image_size=image_size)
    if model.zero_init_residual:
        _zero_last_scales(backbone, model.encoder)
    if model.freeze_patch_projection:
        _freeze_patch_projection(backbone, model.encoder)
    feature_dim = width_of(backbone)
    head, predictor = method.build_head(feature_dim, is_transformer=isinstance(backbone, VisionTransformer))
    return Encoder(
        backbone,
        head,
        predictor,
        feature_dim=feature_dim,
        dim=method.dim,
        mean=model.mean,
        std=model.std,
        image_size=image_size,
        crop=crop,
        channels=model.channels,
    )


def build_stemmed(model: ModelConfig, *, image_size: int) -> nn.Module:
    """Build a backbone with its stem, as `build_encoder` does. Raises ValueError as that."""
    backbone = build_backbone(model.encoder, image_size=image_size, channels=model.channels)
    if model.stem == "cifar":
        _use_cifar_stem(backbone, model.encoder)
    return backbone


def check_image_size(encoder: Encoder, name: str, size: int, *, option: str = "--views.size") -> None:
    """Refuse images of a size that a network cannot take.

    Args:
        encoder: that takes them.
        name: of the encoder.
        size: height and width in pixels.
        option: that gives the size.

    Raises:
        ValueError: with the name and both sizes.
    """
    patches = getattr(encoder.backbone, "patch_embed", None)
    wanted: tuple[int, int] | None = getattr(patches, "img_size", None)
    if wanted is not None and getattr(patches, "strict_img_size", False) and wanted != (size, size):
        raise ValueError(
            f"encoder {name!r} has positions for images of {wanted[0]} pixels alone, but {option} is {size}: use "
            f"{option} {wanted[0]}, or a ResNet"
        )
    if name in ENCODERS:
        return
    try:
        # Shapes alone: on this device nothing is computed, and no generator advances.
        with torch.device("meta"):
            backbone = build_backbone(name, image_size=encoder.image_size, channels=encoder.channels)
            backbone(torch.zeros(2, encoder.channels, size, size))
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"encoder {name!r} cannot take images of {size} pixels ({option}){f': {reason}' if reason else ''}; timm "
            f"has it for {_own_size(name)}"
        ) from error


def _timm_resnet(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, zero_init_last=False, **options)


def _moco_vit(name: str, **options: Any) -> nn.Module:
    """A vision transformer as in MoCo v3: fixed positions, Xavier-uniform weights (its vits.py)."""
    vit = timm.create_model(name, num_classes=0, **options)
    assert isinstance(vit, VisionTransformer)
    assert vit.pos_embed is not None
    rows, columns = vit.patch_embed.grid_size
    with torch.no_grad():
        vit.pos_embed.zero_()[0, 1:] = sine_cosine_positions(rows, columns, vit.embed_dim)
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


def sine_cosine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """MoCo v3's fixed positions of a grid of patches, row by row: (rows * columns, dim) float32 (its vits.py).

    Quarters of the channels: sine and cosine of the row, then sine and cosine of the column, each times frequencies
    that fall from 1 to 1 / 10,000.
    """
    assert dim % 4 == 0
    frequencies = 1 / 10_000 ** (torch.arange(dim // 4) / (dim // 4))  # (dim / 4,)
    places = torch.cartesian_prod(torch.arange(rows).float(), torch.arange(columns).float())  # (rows * columns, 2)
    angles = places[:, :, None] * frequencies  # (rows * columns, 2, dim / 4)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


TIMM_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnext50_32x8d": ("resnext50_32x4d", {"base_width": 8}),
    "resnet50_w2x": ("resnet50", {"channels": [128, 256, 512, 1024]}),
    "resnet50_w4x": ("resnet50", {"channels": [256, 512, 1024, 2048]}),
    "vit_small": ("vit_small_patch16_224", {"num_heads": 12}),
    "vit_base": ("vit_base_patch16_224", {}),
    # The deep stem is the only one of timm's whose width follows `stem_width` (its output has twice as many channels).
    "resnet18_half": ("resnet18", {"channels": [32, 64, 128, 256], "stem_type": "deep", "stem_width": 16}),
    "resnet18_quarter": ("resnet18", {"channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}),
}
"""Our own names for what timm can build: its name, and the options that make the difference."""


def _of_timm(build: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    network, options = TIMM_NETWORKS.get(name, (name, {}))
    return partial(build, network, **options)


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    name: _of_timm(_moco_vit if name.startswith("vit") else _timm_resnet, name)
    for name in ("resnet18", "resnet50", *TIMM_NETWORKS)
}
"""MoCo v1's encoders (24M, 46M, 94M and 375M parameters), its CIFAR demo's ResNet-18, v3's vision transformers, and a
ResNet-18 at half and a quarter of the channels for CPUs. Builders of backbones without a classifier."""


def build_backbone(name: str, *, image_size: int = 224, channels: int = 3) -> nn.Module:
    """Build a backbone without classifier, by a name of ours or of timm's.

    Args:
        name: of the network; its weights are random.
        image_size: height and width of the images in pixels, for networks that are built for one size.
        channels: of the images.

    Raises:
        ValueError: neither we nor timm know the name, it names pretrained weights, or no such network takes the images.
    """
    network, _, tag = name.partition(".")
    if tag and timm.is_model(network):
        raise ValueError(
            f"encoder {name!r} names pretrained weights, but training starts from random ones: use {network!r}, "
            f"and --run.init-from timm:{name} to start from these"
        )
    if not (name in ENCODERS or timm.is_model(name)):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(ENCODERS)} or a timm model"
        raise ValueError(f"encoder {name!r} is unknown, so there is nothing to train: {hint}")
    options: dict[str, Any] = {"img_size": image_size} if _is_of_one_size(name) else {}
    if channels != 3:
        options["in_chans"] = channels
    try:
        if name in ENCODERS:
            return ENCODERS[name](**options)
        if timm.model_entrypoint(name).__module__ == "timm.models.resnet":
            return _timm_resnet(name, **options)
        return _sized(name, **options)
    except AssertionError as error:
        raise ValueError(f"encoder {name!r} takes no images of {image_size} pixels: {error}") from error


def _is_of_one_size(name: str) -> bool:
    """Return whether a network is built for one size of images, as timm says."""
    told = timm.get_pretrained_cfg(TIMM_NETWORKS.get(name, (name,))[0])
    return bool(told and told.fixed_input_size)


def _sized(name: str, **options: Any) -> nn.Module:
    """Build a network of timm's for a size of images, as far as it can be built for another than its own."""
    try:
        return timm.create_model(name, num_classes=0, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        assert options["img_size"] == _own_size(name), f"it is built for {_own_size(name)} pixels alone"
        return timm.create_model(name, num_classes=0, **{key: options[key] for key in options if key != "img_size"})


def _own_size(name: str) -> int | None:
    told = timm.get_pretrained_cfg(name)
    return told.input_size[-1] if told else None


def width_of(backbone: nn.Module) -> int:
    """Return how many numbers a backbone's pooled features have; of timm's networks not always `num_features`."""
    width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return int(width)


def _use_cifar_stem(backbone: nn.Module, name: str) -> None:
    """Put a 3x3 convolution with stride 1 and no pooling in front, as in the authors' CIFAR demo."""
    if not isinstance(backbone, ResNet):
        raise ValueError(
            f"encoder {name!r} is not a ResNet, so it has no CIFAR stem: use the `imagenet` stem or a ResNet"
        )
    # The demo leaves this convolution at torch's default initialization.
    width = int(backbone.bn1.num_features)  # pyright: ignore[reportArgumentType] - timm does not declare it
    first: Any = backbone.conv1  # of one layer, or several
    channels = next(each.in_channels for each in first.modules() if isinstance(each, nn.Conv2d))
    backbone.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)
    backbone.maxpool = nn.Identity()


def _zero_last_scales(backbone: nn.Module, name: str) -> None:
    """Start every residual block as the identity: the last batch norm of each scales by 0 (MoCo v3)."""
    blocks = [block for block in backbone.modules() if isinstance(block, BasicBlock | Bottleneck)]
    if not isinstance(backbone, ResNet) or not blocks:
        raise ValueError(
            f"encoder {name!r} is not a ResNet, so --model.zero-init-residual has no last scale to set to zero: leave "
            "it out, or choose a ResNet"
        )
    for block in blocks:
        block.zero_init_last()


def _freeze_patch_projection(backbone: nn.Module, name: str) -> None:
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"encoder {name!r} has no patch projection to freeze: it is not a vision transformer")
    backbone.patch_embed.proj.requires_grad_(False)


def unit_vectors(features: Tensor) -> Tensor:
    """Features (B, D) divided by their lengths, in float32 (or float64 if they are).

    Not in half precision, where the length of a short vector rounds to zero and the result is not a number.
    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)))
