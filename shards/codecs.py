"""The compiled libraries that packing leans on, with the types they lack."""

import google_crc32c
import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

__all__ = ["Pixels", "crc32c", "decode_jpeg", "encode_jpeg"]

Pixels = NDArray[np.uint8]
"""(H, W, 1) gray or (H, W, 3) RGB."""


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return google_crc32c.value(data)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def decode_jpeg(
    data: bytes, *, gray: bool = False, least: tuple[int, int] | None = None, strict: bool = True
) -> Pixels:
    """Decode a gray, RGB or YCbCr JPEG; EXIF is not looked at.

    Args:
        data: the file.
        gray: give (H, W, 1), not (H, W, 3).
        least: decode at the smallest scale, down to an eighth, that is not below this (width, height).
        strict: also refuse what the decoder could go on from, such as missing data.

    Raises:
        ValueError: damaged.
    """
    width, height = least or (0, 0)
    return simplejpeg.decode_jpeg(
        data, "GRAY" if gray else "RGB", min_width=width, min_height=height, min_factor=8 if least else 1, strict=strict
    )


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Baseline JPEG of C-contiguous pixels; colour is subsampled 4:2:0."""
    if pixels.shape[2] == 1:
        return simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")
