"""Formats of images: which ones Pillow may open, which ones need an extra, and why one was not opened."""

import io
from importlib import import_module
from typing import Any

from PIL import Image

from shards.ground.errors import Rejected
from shards.images.data_files import CONVERTED, HOLD_IMAGES
from shards.images.sniff import SNIFFED_BYTES, container, is_image, unread_image

__all__ = ["ARCHIVE", "early_size", "open_image", "orientation_of", "why_not_opened"]

ARCHIVE = "archive"
"""Reason of an input that holds other files: never a matter of one in many, whatever share may be rejected."""

_ARCHIVES = frozenset({"tar", "zip", "7-Zip", "RAR", "cpio", "Parquet", "Arrow", "TFRecord", "MDS"}) | HOLD_IMAGES
# These hand their bytes to another program, or do not hold a still image.
_REFUSED_FORMATS = frozenset({"EPS", "WMF", "MPEG", "PDF", "HDF5", "GRIB", "BUFR", "FITS", "FPX", "MIC"})
_EXTRAS = {"HEIC": "heic", "JPEG XL": "jxl"}
_JXL = (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")
_LFS = b"version https://git-lfs"
_ORIENTATION_TAG = 0x0112
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def open_image(data: bytes) -> Image.Image:
    """Open an image by Pillow, and by its plugins for HEIC and JPEG XL where they are installed.

    Raises:
        Exception: as Pillow's.
    """
    return Image.open(io.BytesIO(data), formats=_allowed_formats(data[:SNIFFED_BYTES]))


def orientation_of(image: Image.Image) -> int:
    """Return how an opened image is to be turned, 1 to 8 (EXIF 2.3, 4.6.4), without decoding it; 1: it is upright."""
    # Of a PNG without it in the header, Pillow would decode all pixels to look for it behind them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    # Whatever its parsing of a damaged block runs into.
    except Exception:
        return 1


def _allowed_formats(head: bytes) -> list[str]:
    Image.init()
    _has_plugin(unread_image(head))
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def _has_plugin(kind: str | None) -> bool:
    """Register the plugin that reads a kind of image, if there is one here."""
    try:
        if kind == "HEIC":
            heif: Any = import_module("pillow_heif")
            # Workers are processes: threads would only compete.
            heif.options.DECODE_THREADS = 1
            heif.register_heif_opener()
        elif kind == "JPEG XL":
            import_module("pillow_jxl")
            jxl: Any = import_module("pillow_jxl.JpegXLImagePlugin")
            jxl.DECODE_THREADS = 0
    except ImportError:
        return False
    return kind in _EXTRAS


def why_not_opened(data: bytes) -> Rejected:
    """Return why `open_image` did not know what a file is."""
    head = data[:SNIFFED_BYTES]
    kind = unread_image(head)
    if kind is not None and not _has_plugin(kind):
        extra = _EXTRAS[kind]
        return Rejected("unsupported", f"{kind}: install what reads it with `pip install 'moco-fast[{extra}]'`")
    if is_image(head):
        return Rejected("damaged", _reason(data) or "begins as an image, but Pillow does not know its kind")
    if data.startswith(_LFS):
        return Rejected("not an image", "a pointer of Git LFS in place of the file: `git lfs pull` gets the file")
    name = container(head)
    what = f"begins with {data[:8].hex(' ')}{f', as {name} does' if name is not None else ''}"
    if name in CONVERTED:
        what += "; docs/packing.md has commands that convert it"
    return Rejected(ARCHIVE if name in _ARCHIVES else "not an image", what)


def _reason(data: bytes) -> str | None:
    """Return what the decoder says that takes the first bytes for its own; `Image.open` keeps it to itself."""
    for name in _allowed_formats(data[:SNIFFED_BYTES]):
        factory, accept = Image.OPEN[name]
        try:
            # Those without `accept` try any file.
            if accept is not None and accept(data[:16]) is True:
                factory(io.BytesIO(data), "")
        except Exception as error:
            said = str(error).partition("\n")[0][:200]
            return f"{name}: {said or type(error).__name__}"
    return None


def early_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG XL, which its plugin decodes whole when it opens it; None for other images.

    ISO/IEC 18181-1, annex D.2: bits are read from the lowest on.
    """
    if not data.startswith(_JXL):
        return None
    start = 0 if data[:2] == _JXL[1] else _codestream(data)
    bits = int.from_bytes(data[start + 2 : start + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    def side(*, is_small: int) -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    height = side(is_small=is_small)
    ratio = take(3)
    if not ratio:
        return side(is_small=is_small), height
    numerator, denominator = _JXL_RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _codestream(data: bytes) -> int:
    """Return where the codestream begins in a file of boxes; 0 where there is none."""
    at = 0
    while at + 8 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if kind in (b"jxlc", b"jxlp"):
            # Parts have numbers.
            return at + head + (4 if kind == b"jxlp" else 0)
        if size < head:
            break
        at += size
    return 0
