"""The compiled libraries that packing leans on, with the types they lack."""

from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

__all__ = ["Pixels", "crc32c", "decode_jpeg", "encode_jpeg", "shrink"]

Pixels = NDArray[np.uint8]
"""(H, W, 1) gray or (H, W, 3) RGB."""


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return google_crc32c.value(data)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def decode_jpeg(data: bytes, *, gray: bool = False, reduce: int = 1, strict: bool = True) -> Pixels:
    """Decode a gray, RGB or YCbCr JPEG; EXIF is not looked at.

    Args:
        data: the file.
        gray: give (H, W, 1), not (H, W, 3).
        reduce: 1, 2, 4 or 8: decode each side at a half, a quarter or an eighth.
        strict: also refuse what the decoder could go on from, such as missing data.

    Raises:
        ValueError: damaged.
    """
    space = "GRAY" if gray else "RGB"
    if reduce == 1:
        return simplejpeg.decode_jpeg(data, space, strict=strict)
    # Of all scales above the least sides, the library takes the smallest.
    header = simplejpeg.decode_jpeg_header(data, strict=strict)
    height, width = -(-int(header[0]) // reduce), -(-int(header[1]) // reduce)
    return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height, min_factor=reduce, strict=strict)


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Baseline JPEG of C-contiguous pixels; colour is subsampled 4:2:0."""
    if pixels.shape[2] == 1:
        return simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")


def shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Shrink C-contiguous pixels to a (width, height) by averaging areas."""
    resized = _opencv().resize(pixels, size, interpolation=_opencv().INTER_AREA)
    return resized if resized.ndim == 3 else resized[:, :, None]


@lru_cache(maxsize=1)
def _opencv() -> Any:
    # Loaded by those who resize; workers are processes, so its threads would only compete.
    import cv2

    cv2.setNumThreads(0)
    return cv2
