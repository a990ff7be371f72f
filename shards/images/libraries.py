"""Compiled libraries that packing uses, with the types that they lack."""

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs] - it has none
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from shards.ground.arrays import Pixels
from shards.images.jpeg import parse_jpeg

__all__ = [
    "CodecError",
    "calling",
    "codec",
    "decode_jpeg",
    "decode_values",
    "encode_jpeg",
    "pillow_limits",
    "reads_sampling",
    "report_codecs",
    "shrink",
    "spreads",
    "sum_channels",
]

# Shrinking a side by less than this is done by a Gaussian of three taps and cubic interpolation.
_FAR = 1.7
_MAX_TEXT_BYTES = 1 << 28


class CodecError(ValueError):
    """A library failed in a way of its own; the message names it."""


_reports: list[Callable[[str], object]] = []


def report_codecs(report: Callable[[str], object]) -> None:
    """From now on call `report` with a library's name before each call of it."""
    _reports[:] = [report]


def calling(name: str) -> None:
    """Say which library is called next: if it ends the process, that is its cause."""
    for report in _reports:
        report(name)


@contextmanager
def codec(name: str) -> Generator[None]:
    """Turn whatever a library raises beyond ValueError into a CodecError: one image must not end a packing."""
    calling(name)
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
    calling("simplejpeg")
    try:
        simplejpeg.decode_jpeg_header(data, strict=False)
    # For factors that it has no name for, the library fails with a KeyError.
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


@contextmanager
def pillow_limits(max_pixels: int) -> Generator[None]:
    """Let Pillow refuse images above the limit wherever they are (an icon may hold a PNG), and warn of nothing else."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = max_pixels
    # Long texts and profiles are no damage.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def decode_values(data: bytes) -> NDArray[Any]:
    """Decode the first image of a file with the values that it holds, (H, W, C), RGB. Raises CodecError."""
    with codec("OpenCV"):
        cv2 = _opencv()
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise CodecError("OpenCV: cannot decode it")
        if values.ndim == 2:
            return values[:, :, None]
        return values[:, :, [2, 1, 0, *range(3, values.shape[2])]] if values.shape[2] > 2 else values


def sum_channels(pixels: Pixels) -> list[int]:
    """Return the sum of each channel, exact."""
    return [int(value) for value in _opencv().sumElems(pixels)[: pixels.shape[2]]]


def spreads(pixels: Pixels) -> list[float]:
    """Return the standard deviation of each channel of C-contiguous pixels."""
    return _opencv().meanStdDev(pixels)[1].ravel().tolist()


@lru_cache(maxsize=1)
def _opencv() -> Any:
    # Loaded only where pixels are needed; workers are processes, so its threads would only compete.
    import cv2

    cv2.setNumThreads(0)
    # What it makes of odd files in passing is no message to a user.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
