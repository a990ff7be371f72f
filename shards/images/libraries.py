"""Compiled libraries that packing uses, with the types that they lack."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import simplejpeg  # pyright: ignore[reportMissingTypeStubs] - it has none

from shards.ground.arrays import Pixels
from shards.images.jpeg import parse_jpeg

__all__ = [
    "CodecError",
    "codec",
    "decode_jpeg",
    "encode_jpeg",
    "reads_header",
    "reads_sampling",
    "shrink",
    "sum_channels",
]

# Shrinking a side by less than this is done by a Gaussian of three taps and cubic interpolation.
_FAR = 1.7


class CodecError(ValueError):
    """A library failed in a way of its own; the message names it."""


@contextmanager
def codec(name: str) -> Generator[None]:
    """Turn whatever a library raises beyond ValueError into a CodecError: one image must not end a packing."""
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise CodecError(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error


def decode_jpeg(data: bytes, *, gray: bool = False, reduce: int = 1, strict: bool = True) -> Pixels:
    """Decode a gray, RGB or YCbCr JPEG; EXIF is not looked at.

    Args:
        data: the file.
        gray: give (H, W, 1), not (H, W, 3).
        reduce: 1, 2, 4 or 8: decode each side at a half, a quarter or an eighth.
        strict: also refuse what the decoder could work around, such as missing data.

    Raises:
        ValueError: damaged.
    """
    space = "GRAY" if gray else "RGB"
    if reduce == 1:
        with codec("simplejpeg"):
            return simplejpeg.decode_jpeg(data, space, strict=strict)
    # Of all scales above the least sides, the library takes the smallest.
    header = parse_jpeg(data)
    height, width = -(-header.height // reduce), -(-header.width // reduce)
    with codec("simplejpeg"):
        return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height, min_factor=reduce, strict=strict)


def reads_sampling(data: bytes) -> bool:
    """Return whether `decode_jpeg` knows a JPEG's sampling factors."""
    try:
        simplejpeg.decode_jpeg_header(data, strict=False)
    # For factors that it has no name for, the library fails with a KeyError.
    except Exception:
        return False
    return True


def reads_header(data: bytes) -> bool:
    """Return whether `decode_jpeg` takes a JPEG's header without complaint; takes microseconds."""
    try:
        simplejpeg.decode_jpeg_header(data)
    except Exception:
        return False
    return True


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode C-contiguous pixels as a baseline JPEG; color is subsampled 4:2:0. Raises CodecError."""
    with codec("simplejpeg"):
        if pixels.shape[2] == 1:
            return simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
        return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")


def shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Shrink C-contiguous pixels to a (width, height).

    Areas are averaged where that is a long way. Else a Gaussian takes away what the new grid cannot hold, and cubic
    interpolation places the rest: closer to a Lanczos filter than averaging (SSIM, `benchmarks/pack.py`), in half the
    time. Raises CodecError.
    """
    with codec("OpenCV"):
        return _shrink(pixels, size)


def _shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    cv2 = _opencv()
    factors = [old / new for old, new in zip((pixels.shape[1], pixels.shape[0]), size, strict=True)]
    if max(factors) < _FAR:
        # The new pixel's width and the old one's add in squares; the share of it gave the best SSIM on photos.
        sigmas = [max(1e-6, 0.45 * math.sqrt(factor**2 - 1)) for factor in factors]
        smooth = cv2.GaussianBlur(pixels, (3, 3), sigmas[0], sigmaY=sigmas[1], borderType=cv2.BORDER_REPLICATE)
        resized = cv2.resize(smooth, size, interpolation=cv2.INTER_CUBIC)
    else:
        resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return resized if resized.ndim == 3 else resized[:, :, None]


def sum_channels(pixels: Pixels) -> list[int]:
    """Return the sum of each channel, exact."""
    return [int(value) for value in _opencv().sumElems(pixels)[: pixels.shape[2]]]


@lru_cache(maxsize=1)
def _opencv() -> Any:
    # Loaded only where pixels are needed; workers are processes, so its threads would only compete.
    import cv2

    cv2.setNumThreads(0)
    return cv2
