"""Depth: which values of images with more than 8 bits per channel become black and white.

Microscopes, cameras and telescopes write 10, 12 or 14 bits into files of 16, and floating-point numbers of any range.
What a set uses is one range for all of its images: a range for each would take their brightness away.
"""

import io
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin

from shards.ground.arrays import Pixels
from shards.images.libraries import decode_values, pillow_limits

__all__ = [
    "DeepHeader",
    "DepthRange",
    "Values",
    "deep_header",
    "may_be_deep",
    "measure",
    "range_of",
    "to_pixels",
    "values_of",
]

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _SAMPLES, _FORMAT = 256, 257, 258, 274, 277, 339
_BITS_IN_USE = (8, 10, 12, 14, 16)


@dataclass(frozen=True, kw_only=True)
class DepthRange:
    """The values that become black and white."""

    bits: int = 16
    """Of integers: 0 is black, 2 ** bits - 1 white."""
    low: float = 0.0
    """Of floating-point numbers: black."""
    high: float = 1.0
    """Of floating-point numbers: white."""

    @classmethod
    def parse(cls, text: str) -> "DepthRange":
        """Read what PackConfig.depth_range says; `auto` and `full` are the whole range of a type."""
        wanted = cls()
        for part in text.split(","):
            low, colon, high = part.partition(":")
            if colon:
                wanted = replace(wanted, low=float(low), high=float(high))
            elif part not in ("auto", "full"):
                wanted = replace(wanted, bits=int(part))
        return wanted

    def __str__(self) -> str:
        return f"{self.bits},{self.low:g}:{self.high:g}"


class DeepHeader(NamedTuple):
    """What the header of a PNG or TIFF with more than 8 bits per channel says."""

    width: int
    height: int
    bits: int
    """Of a channel, in the file."""
    is_float: bool
    num_channels: int
    orientation: int = 1
    """As in EXIF; a PNG's is not looked for."""


class Values(NamedTuple):
    """The range of values of one image."""

    is_float: bool
    low: float
    high: float


def deep_header(data: bytes) -> DeepHeader | None:
    """Return the header of a PNG or TIFF with more than 8 bits per channel; None for any other file."""
    if not may_be_deep(data[:26]):
        return None
    if data[:8] == _PNG:
        channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(data[25] if len(data) > 25 else 0, 3)
        return DeepHeader(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), 16, False, channels)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if b"+" in data[2:4] else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, is_float = max(tags.get(_BITS, (1,))), 3 in tags.get(_FORMAT, (1,))
        channels, orientation = tags.get(_SAMPLES, 1), tags.get(_ORIENTATION, 1)
        header = DeepHeader(int(tags[_WIDTH]), int(tags[_HEIGHT]), int(bits), is_float, int(channels), int(orientation))
    # Whatever a damaged one leads to; what decodes it says what is wrong.
    except Exception:
        return None
    return header if bits > 8 else None


def values_of(data: bytes, header: DeepHeader, image: Image.Image | None) -> tuple[NDArray[Any], bool]:
    """Return the values that an image holds, (H, W, C), of any type, and whether they are upright already.

    Args:
        data: the file.
        header: its `deep_header`.
        image: the same, opened by Pillow, if it can; then it decides whether the image is damaged.
    """
    if image is not None:
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            # Of a TIFF, loading it has done that.
            return np.asarray(ImageOps.exif_transpose(image))[:, :, None], True
    values = decode_values(data)
    if values.shape[2] == 2:
        values = values[:, :, [0, 0, 0, 1]]
    if sorted(values.shape[:2]) != sorted((header.height, header.width)):
        raise ValueError(f"says that it is {header.width} x {header.height} pixels, and holds {values.shape[:2][::-1]}")
    # OpenCV turns TIFFs, and PNGs not.
    return values, data[:8] != _PNG


def may_be_deep(head: bytes) -> bool:
    """Return whether the first bytes, at least 26 of them, are of a file that may have a `deep_header`."""
    return head[:4] in _TIFF or (head[:8] == _PNG and head[24:25] == b"\x10")


def measure(data: bytes, max_pixels: int) -> Values | None:
    """Return the range of an image's values; None where its channels have 8 bits, or it is too large or damaged."""
    try:
        header = deep_header(data)
        if header is None or header.width * header.height > max_pixels:
            return None
        with pillow_limits(max_pixels):
            image = None if header.is_float and header.num_channels > 1 else Image.open(io.BytesIO(data))
            values = values_of(data, header, image)[0][:, :, :3]
        values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        return Values(values.dtype.kind == "f", float(values.min()), float(values.max())) if values.size else None
    except MemoryError:
        raise
    # It comes up again when the image is packed.
    except Exception:
        return None


def range_of(found: list[Values]) -> DepthRange:
    """Return the range for all images of a set, from those of some: the usual one that holds them all."""
    ints = max((values.high for values in found if not values.is_float), default=float("inf"))
    bits = next((bits for bits in _BITS_IN_USE if ints < 1 << bits), 16)
    low = min((values.low for values in found if values.is_float), default=0.0)
    high = max((values.high for values in found if values.is_float), default=1.0)
    if low >= 0:
        usual = (1.0, *(float((1 << bits) - 1) for bits in _BITS_IN_USE))
        low, high = 0.0, next((white for white in usual if high <= white), high)
    return DepthRange(bits=bits, low=low, high=high if high > low else low + 1)


def to_pixels(values: NDArray[Any], wanted: DepthRange, *, file_bits: int = 16) -> Pixels:
    """Turn values into pixels, (H, W, 1) or (H, W, 3), over white where there is transparency.

    Args:
        values: (H, W, C): gray, RGB or RGB with opacity.
        wanted: what becomes black and white.
        file_bits: what the file says that it has; some TIFFs have 12.
    """
    bits = min(wanted.bits, file_bits)
    if values.dtype.kind == "f":
        known = np.nan_to_num(values.astype(np.float32), nan=wanted.low).clip(wanted.low, wanted.high)
        pixels = np.rint(255 * ((known - wanted.low) / (wanted.high - wanted.low)).clip(0, 1)).astype(np.uint8)
    else:
        pixels = (values.astype(np.int32).clip(0, (1 << bits) - 1) >> (bits - 8)).astype(np.uint8)
    if pixels.shape[2] < 4:
        return pixels
    opacity = pixels[:, :, 3:].astype(np.int32)
    over = pixels[:, :, :3] * opacity + 255 * (255 - opacity)
    return ((over + 127) // 255).astype(np.uint8)
