"""Encoding of one image as a baseline JPEG: copied byte for byte where possible, else decoded and encoded again."""

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from shards.config import EncodeConfig
from shards.ground.arrays import Pixels
from shards.ground.errors import Rejected
from shards.images.data_files import CONVERTED, HOLD_IMAGES
from shards.images.jpeg import JpegError, JpegHeader, is_jpeg, parse_jpeg, with_sound_scan
from shards.images.libraries import (
    CodecError,
    decode_jpeg,
    encode_jpeg,
    reads_header,
    reads_sampling,
    shrink,
    sum_channels,
)
from shards.images.scan import looks_whole
from shards.images.sniff import SNIFFED_BYTES, container, is_image, unread_image
from shards.images.transcode import transcode_jpeg, transcoder

__all__ = ["ARCHIVE", "PackedImage", "encode"]

ARCHIVE = "archive"
"""Reason of an input that holds other files: never a matter of one in many, whatever share may be rejected."""

_ARCHIVES = frozenset({"tar", "zip", "7-Zip", "RAR", "cpio", "Parquet", "Arrow", "TFRecord", "MDS"}) | HOLD_IMAGES
_MAX_JPEG_SIDE = 65500
_MAX_TEXT_BYTES = 1 << 28
# These hand their bytes to another program, or do not hold a still image.
_REFUSED_FORMATS = frozenset({"EPS", "WMF", "MPEG", "PDF", "HDF5", "GRIB", "BUFR", "FITS", "FPX", "MIC"})
_EOI = b"\xff\xd9"
_SMALL_PIXELS = 1 << 16


class PackedImage(NamedTuple):
    """A packed image."""

    data: bytes
    width: int
    height: int
    mean_rgb: tuple[int, int, int] | None
    outcomes: tuple[str, ...]
    """What was done: `copied`, or each change that was made."""
    kind: str
    """As in JpegHeader.kind."""


def encode(data: bytes, config: EncodeConfig) -> PackedImage:
    """Turn the bytes of any still image into a baseline JPEG, RGB or gray, upright.

    Raises:
        Rejected: not an image, damaged, or outside the limits; or a library failed at it, which the detail names.
        ValueError: a library that the settings need is not installed.
    """
    if not data:
        raise Rejected("empty")
    try:
        return _encode(data, config)
    except CodecError as error:
        raise Rejected("codec failed", str(error)) from None


def _encode(data: bytes, config: EncodeConfig) -> PackedImage:
    if is_jpeg(data):
        try:
            header = parse_jpeg(data)
        except JpegError as error:
            raise Rejected("damaged", str(error)) from None
        _check_limits(header.width, header.height, config)
        return _encode_jpeg(data, header, config)
    return _encode_other(data, config)


def _check_limits(width: int, height: int, config: EncodeConfig) -> None:
    size = f"{width} x {height} pixels"
    if width * height > config.max_pixels:
        raise Rejected("too many pixels", f"{size}, more than {config.max_pixels}")
    if min(width, height) < config.min_size:
        raise Rejected("too small", f"{size}, shorter side below {config.min_size}")
    if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
        raise Rejected("too elongated", f"{size}, sides differ by more than {config.max_aspect:g}")


def _target_size(width: int, height: int, config: EncodeConfig) -> tuple[int, int]:
    """Return the size after resizing, (width, height), at least one pixel each."""
    goal = config.resize
    if goal is None:
        return width, height
    if config.resize_mode == "exact":
        return goal, goal
    side = min(width, height) if config.resize_mode == "shorter" else max(width, height)
    if side <= goal:
        return width, height
    return max(1, (width * goal + side // 2) // side), max(1, (height * goal + side // 2) // side)


def _reduction(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Return how far a decoder may shrink an image that becomes `target`, with twice the target's sides to spare."""
    fits = (
        factor
        for factor in (8, 4, 2)
        if all(2 * goal * factor <= side for side, goal in zip(size, target, strict=True))
    )
    return next(fits, 1)


def _encode_jpeg(original: bytes, header: JpegHeader, config: EncodeConfig) -> PackedImage:
    if header.precision != 8:
        raise Rejected("unsupported", f"a JPEG of {header.precision} bits, which none of the libraries here reads")
    data = with_sound_scan(original, header)
    is_known = header.has_usual_sampling or reads_sampling(data)
    upright = header.orientation == 1
    turned = header.orientation >= 5
    size = (header.height, header.width) if turned else (header.width, header.height)
    target = _target_size(*size, config)
    if header.is_baseline and header.is_ycbcr_or_gray and upright and target == size and is_known:
        copied = _copy(data, header, config)
        if copied is not None:
            return copied if data is original else copied._replace(outcomes=("repaired",))
    if config.progressive == "transcode" and header.is_progressive and upright and target == size:
        transcoded = _transcode(data, header, config)
        if transcoded is not None:
            return transcoded
    outcomes: list[str] = []
    if header.num_components in (1, 3) and is_known:
        pixels, repaired = _decode_jpeg(data, _reduction(size, target), gray=header.num_components == 1)
        outcomes += ["repaired"] if repaired or data is not original else []
        pixels = _orient(pixels, header.orientation)
    else:
        # CMYK, odd sampling factors and similar; Pillow also turns them upright.
        pixels, _ = _decode_with_pillow(data, config)
        outcomes += ["resampled"] if not is_known else []
    if not header.is_ycbcr_or_gray:
        outcomes.append("recolored")
    if not header.is_baseline:
        outcomes.append("made baseline")
    if not upright:
        outcomes.append("turned upright")
    if target != size:
        outcomes.append("resized")
    return _finish(pixels, target, outcomes, config)


def _copy(data: bytes, header: JpegHeader, config: EncodeConfig) -> PackedImage | None:
    """Return the image as it is; None where it must be decoded after all."""
    outcome = "copied"
    if not config.mean_rgb and reads_header(data) and looks_whole(data, header.scan_at):
        return PackedImage(data, header.width, header.height, None, (outcome,), header.kind)
    try:
        small = _decode_small(data, header)
    except CodecError:
        raise
    except ValueError as error:
        if "extraneous" in str(error):
            return None
        # A file whose very last bytes are missing is whole but for its end marker.
        ended = data + _EOI if data[-1] != 0xFF else data + _EOI[1:]
        try:
            small = _decode_small(ended, header)
        except ValueError:
            raise Rejected("damaged", str(error)) from None
        data, outcome = ended, "repaired"
    mean = _mean_rgb(small) if config.mean_rgb else None
    return PackedImage(data, header.width, header.height, mean, (outcome,), header.kind)


def _transcode(data: bytes, header: JpegHeader, config: EncodeConfig) -> PackedImage | None:
    """Return a progressive JPEG as a baseline one, without loss; None where it must be decoded after all."""
    # Without the library there are no shards: bytes must not depend on what a machine lacks.
    transcoder()
    if not header.is_ycbcr_or_gray:
        return None
    try:
        small = _decode_small(data, header)
        transcoded = transcode_jpeg(data)
        found = parse_jpeg(transcoded)
    except ValueError:
        # Whether it can be repaired, and what is wrong otherwise, shows when it is decoded whole.
        return None
    # Coarse quantization tables, for one, may need more than baseline allows.
    if not found.is_baseline or found[:3] != header[:3]:
        return None
    mean = _mean_rgb(small) if config.mean_rgb else None
    return PackedImage(transcoded, header.width, header.height, mean, ("transcoded",), found.kind)


def _decode_small(data: bytes, header: JpegHeader) -> Pixels:
    """Decode at an eighth of each side: only the first coefficient of each block is transformed, but all are read."""
    # Blocks that reach over the border weigh too much in the mean of a small image; decoding it whole costs little.
    is_small = header.width * header.height < _SMALL_PIXELS
    return decode_jpeg(data, gray=header.num_components == 1, reduce=1 if is_small else 8)


def _decode_jpeg(data: bytes, reduce: int, *, gray: bool) -> tuple[Pixels, bool]:
    """Return the pixels of a JPEG, and whether the decoder had to skip stray bytes.

    Args:
        data: the file.
        reduce: 1, 2, 4 or 8: shrink each side while decoding.
        gray: (H, W, 1) instead of (H, W, 3).
    """
    try:
        return decode_jpeg(data, gray=gray, reduce=reduce), False
    except CodecError:
        raise
    except ValueError as error:
        if "extraneous" not in str(error):
            raise Rejected("damaged", str(error)) from None
    try:
        return decode_jpeg(data, gray=gray, reduce=reduce, strict=False), True
    except ValueError as error:
        raise Rejected("damaged", str(error)) from None


def _encode_other(data: bytes, config: EncodeConfig) -> PackedImage:
    pixels, outcomes = _decode_with_pillow(data, config)
    height, width = pixels.shape[:2]
    target = _target_size(width, height, config)
    if target != (width, height):
        outcomes.append("resized")
    return _finish(pixels, target, ["converted", *outcomes], config)


def _finish(pixels: Pixels, target: tuple[int, int], outcomes: list[str], config: EncodeConfig) -> PackedImage:
    """Resize to `target` (width, height) and compress."""
    height, width = pixels.shape[:2]
    if (width, height) != target:
        pixels = _resize(pixels, target)
    width, height = target
    if max(target) > _MAX_JPEG_SIDE:
        raise Rejected("too many pixels", f"{width} x {height} pixels: a side longer than JPEG can hold")
    pixels = np.ascontiguousarray(pixels)
    data = encode_jpeg(pixels, config.quality)
    mean = _mean_rgb(pixels) if config.mean_rgb else None
    return PackedImage(data, width, height, mean, tuple(outcomes), parse_jpeg(data).kind)


def _resize(pixels: Pixels, target: tuple[int, int]) -> Pixels:
    """Resize (H, W, C) to (target[1], target[0], C): `shrink` where both sides shrink, else Lanczos."""
    height, width, channels = pixels.shape
    if target[0] <= width and target[1] <= height:
        return shrink(np.ascontiguousarray(pixels), target)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    resized = np.asarray(image.resize(target, Image.Resampling.LANCZOS))
    return resized if resized.ndim == 3 else resized[:, :, None]


def _mean_rgb(pixels: Pixels) -> tuple[int, int, int]:
    height, width, channels = pixels.shape
    sums = sum_channels(pixels)
    values = [(2 * value + height * width) // (2 * height * width) for value in sums]
    return (values[0], values[0], values[0]) if channels == 1 else (values[0], values[1], values[2])


def _orient(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: (H, W, C), or (W, H, C) for those that swap the sides."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    # After a possible transposition, these mirror rows or columns (EXIF 2.3, 4.6.4, tag 0x0112).
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


@contextmanager
def _pillow_limits(max_pixels: int) -> Generator[None]:
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


def _allowed_formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def _decode_with_pillow(data: bytes, config: EncodeConfig) -> tuple[Pixels, list[str]]:
    """Return (H, W, 1) or (H, W, 3) upright pixels of the first frame, and what had to be done."""
    try:
        with _pillow_limits(config.max_pixels), Image.open(io.BytesIO(data), formats=_allowed_formats()) as image:
            _check_limits(*image.size, config)
            return _to_pixels(image)
    except Rejected:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Rejected("too many pixels", _first_line(error)) from None
    except Image.UnidentifiedImageError:
        head = data[:SNIFFED_BYTES]
        if unread_image(head) is not None:
            raise Rejected("unsupported", f"{unread_image(head)}: convert it to another format first") from None
        if is_image(head):
            raise Rejected("damaged", "begins as an image, but Pillow cannot read its header") from None
        kind = container(head)
        what = f"begins with {data[:8].hex(' ')}{f', as {kind} does' if kind is not None else ''}"
        if kind in CONVERTED:
            what += "; docs/packing.md has commands that convert it"
        raise Rejected(ARCHIVE if kind in _ARCHIVES else "not an image", what) from None
    except MemoryError:
        raise
    # Pillow's plugins raise whatever their parsing runs into: struct.error, IndexError, SyntaxError, zlib.error ...
    except Exception as error:
        raise Rejected("damaged", f"{type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _to_pixels(image: Image.Image) -> tuple[Pixels, list[str]]:
    outcomes: list[str] = []
    if cast("int", getattr(image, "n_frames", 1)) > 1:
        outcomes.append("first frame")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) not in (0, 1):
        outcomes.append("turned upright")
    mode = upright.mode
    if mode.startswith("I;16") or mode == "I":
        return _from_16_bit(upright), [*outcomes, "16 bit to 8"]
    if mode == "F":
        raise Rejected("unsupported", "floating-point pixels have no agreed range")
    if upright.has_transparency_data:
        outcomes.append("flattened")
        layered = upright.convert("RGBA")
        background = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(background, layered)
    gray = mode in ("1", "L")
    pixels = np.asarray(upright.convert("L" if gray else "RGB"))
    return (pixels[:, :, None] if gray else pixels), outcomes


def _from_16_bit(image: Image.Image) -> Pixels:
    values = np.asarray(image)
    return (np.clip(values.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
