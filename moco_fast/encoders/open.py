"""Opening of encoders from anywhere: runs, the authors' files, other libraries' networks by file, folder or name."""

from dataclasses import replace
from typing import Any

import torch

from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, digest_of
from moco_fast.encoders.formats.registry import FORMATS, formats

__all__ = ["OpenedEncoder", "Which", "open_encoder"]


def open_encoder(where: str, *, which: Which = "query", image_size: int | None = None) -> OpenedEncoder:
    """Open an encoder, whatever keeps it: what is there says what it is. Nothing is downloaded, no code in it is run.

        opened = open_encoder("moco_v2_800ep_pretrain.pth.tar")
        features = opened.encoder.features(images, "backbone")  # images: (B, 3, H, W) uint8

    Args:
        where: folder of a run of ours or a checkpoint; a file of the authors' MoCo v1, v2 or v3; weights of a
            torchvision ResNet; a folder of timm's or transformers' (config.json and weights); `torchvision:NAME` or
            `timm:NAME`, whose weights are in the library's cache, or `timm:NAME@FILE` (docs/encoders.md).
        which: of an encoder that was trained with its slow average, the one or the other.
        image_size: side of the images that it is for, in pixels; a transformer's positions are resampled. Unset: as it
            was trained.

    Raises:
        ValueError: there is nothing, nothing that is known, or it is damaged; with what was seen there.
    """
    place = Place.of(where)
    if place.library is not None and place.library not in FORMATS:
        raise ValueError(f"{where}: there is no library {place.library!r}; names begin with torchvision: or timm:")
    takers = {name: each for name, each in formats().items() if each.takes(place)}
    if not takers:
        raise ValueError(
            f"{place.described()}. These are weights of no network that is known by its names alone: say which it is, "
            "as in timm:NAME@FILE or torchvision:NAME@FILE"
        )
    if len(takers) > 1:
        raise ValueError(
            f"{place.described()}. That may be of {' or of '.join(takers)}: say which, as in timm:NAME@FILE"
        )
    (taker,) = takers.values()
    # Networks are built with random weights before they get theirs: what the caller draws does not change by it.
    with torch.random.fork_rng(devices=[]):
        opened = taker.open(place, which)
    if image_size is None or image_size == opened.encoder.image_size:
        return opened
    _resize(opened.encoder, image_size, opened.name)
    return replace(opened, digest=digest_of(opened.encoder))


def _resize(encoder: Encoder, size: int, name: str) -> None:
    """Get an encoder ready for images of another size. Raises ValueError: it cannot take them."""
    backbone: Any = encoder.backbone
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1, 1))
    if any(size % side for side in patch):
        raise ValueError(f"{name} cuts images into patches of {patch[0]} pixels, and {size} is not a multiple of that")
    if hasattr(backbone, "set_input_size"):
        backbone.set_input_size((size, size))
    # torchvision's transformers; timm's others with a fixed size.
    elif hasattr(backbone, "image_size") or getattr(backbone, "pretrained_cfg", {}).get("fixed_input_size"):
        raise ValueError(f"{name} takes images of {encoder.image_size} pixels alone, not of {size}")
    encoder.image_size = size
