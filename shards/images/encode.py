"""Encoding of one image as a baseline JPEG: copied byte for byte where possible, else decoded and encoded again."""

import math
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps

from shards.config import EncodeConfig
from shards.ground.arrays import Pixels
from shards.ground.errors import Rejected
from shards.images.depth import DeepHeader, DepthRange, deep_header, to_pixels, values_of
from shards.images.formats import early_size, open_image, why_not_opened
from shards.images.isolation import CODEC_FAILED, Limits, run_codecs
from shards.images.jpeg import JpegError, JpegHeader, is_jpeg, parse_jpeg, with_sound_scan, without_stray_bytes
from shards.images.libraries import (
    CodecError,
    calling,
    decode_jpeg,
    encode_jpeg,
    pillow_limits,
    reads_sampling,
    shrink,
    spreads,
    sum_channels,
)
from shards.images.scan import looks_whole
from shards.images.transcode import transcode_jpeg, transcoder

__all__ = ["PackedImage", "encode", "encode_safely"]

_MAX_JPEG_SIDE = 65500
_EOI = b"\xff\xd9"
_SMALL_PIXELS = 1 << 16
_UNIFORM_STD = 2.0
# Of larger images, every second row and column and so on is enough.
_MANY_PIXELS = 1 << 19


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
    is_uniform: bool = False
    """Whether it was decoded and is nearly one color."""
    flags: int = 0
    """What a reader should know, as in the index, of an image that is kept as it is."""
    orientation: int = 1
    """By EXIF, of an image that is kept as it is."""
    extension: str = "jpg"


def encode_safely(data: bytes, config: EncodeConfig) -> PackedImage:
    """Do what `encode` does, for which a library that crashes is one that fails.

    Raises:
        Rejected: as `encode`, or a library crashed.
        ValueError: a library that the settings need is not installed.
        PackError: the machine runs out of memory.
    """
    limits = Limits.of(config.max_pixels)
    return _copy_unseen(data, config) or run_codecs(encode, limits, data, config)


def _copy_unseen(data: bytes, config: EncodeConfig) -> PackedImage | None:
    """Return a JPEG as `encode` would, if it is copied and no library has to see it; else None."""
    if config.mean_rgb:
        return None
    try:
        header = parse_jpeg(data) if is_jpeg(data) else None
    except JpegError:
        return None
    if header is None or not header.has_usual_sampling or not _may_be_copied(header, config):
        return None
    if with_sound_scan(data, header) is not data or not looks_whole(data, header.scan_at):
        return None
    _check_limits(header.width, header.height, config)
    return PackedImage(data, header.width, header.height, None, ("copied",), header.kind)


def _may_be_copied(header: JpegHeader, config: EncodeConfig) -> bool:
    """Whether what the header says allows to keep a JPEG as it is."""
    size = header.width, header.height
    return (
        header.is_baseline
        and header.is_ycbcr_or_gray
        and header.orientation == 1
        and _target_size(*size, config) == size
    )


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
        raise Rejected(CODEC_FAILED, str(error)) from None


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
    data, header = _with_sound_header(with_sound_scan(original, header), header)
    is_known = header.has_usual_sampling or reads_sampling(data)
    upright = header.orientation == 1
    turned = header.orientation >= 5
    size = (header.height, header.width) if turned else (header.width, header.height)
    target = _target_size(*size, config)
    if _may_be_copied(header, config) and is_known:
        copied = _copy(data, header, config)
        if copied is not None:
            return copied if data is original else copied._replace(outcomes=("repaired",))
    if config.progressive == "transcode" and header.is_progressive and upright and target == size:
        transcoded = _transcode(data, header, config)
        if transcoded is not None:
            return transcoded
    outcomes: list[str] = []
    if header.num_components in (1, 3) and is_known:
        pixels, repaired = _decode_jpeg(data, header, _reduction(size, target))
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


def _with_sound_header(data: bytes, header: JpegHeader) -> tuple[bytes, JpegHeader]:
    """Take out stray bytes, which viewers pass over and the decoder does not."""
    try:
        cleaned = without_stray_bytes(data)
        return (data, header) if cleaned == data else (cleaned, parse_jpeg(cleaned))
    except JpegError as error:
        raise Rejected("damaged", str(error)) from None


def _copy(data: bytes, header: JpegHeader, config: EncodeConfig) -> PackedImage | None:
    """Return the image as it is; None where it must be decoded after all."""
    outcome = "copied"
    if not config.mean_rgb and looks_whole(data, header.scan_at):
        return PackedImage(data, header.width, header.height, None, (outcome,), header.kind)
    try:
        small = _decode_small(data, header)
    except CodecError:
        raise
    except ValueError as error:
        if "extraneous" in str(error):
            return None
        ended = _ended(data)
        try:
            small = _decode_small(ended, header)
        except ValueError:
            raise Rejected("damaged", str(error)) from None
        data, outcome = ended, "repaired"
    mean = _mean_rgb(small) if config.mean_rgb else None
    return PackedImage(data, header.width, header.height, mean, (outcome,), header.kind, _is_uniform(small))


def _ended(data: bytes) -> bytes:
    """Return a file with an end marker: without its very last bytes it may be whole but for that."""
    return data + _EOI if data[-1] != 0xFF else data + _EOI[1:]


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
    is_uniform = _is_uniform(small)
    return PackedImage(transcoded, header.width, header.height, mean, ("transcoded",), found.kind, is_uniform)


def _decode_small(data: bytes, header: JpegHeader) -> Pixels:
    """Decode at an eighth of each side: only the first coefficient of each block is transformed, but all are read."""
    # Blocks that reach over the border weigh too much in the mean of a small image; decoding it whole costs little.
    is_small = header.width * header.height < _SMALL_PIXELS
    return decode_jpeg(data, gray=header.num_components == 1, reduce=1 if is_small else 8)


def _decode_jpeg(data: bytes, header: JpegHeader, reduce: int) -> tuple[Pixels, bool]:
    """Return the pixels of a JPEG, and whether stray bytes were skipped in it or its end marker was missing.

    Args:
        data: the file.
        header: its header; of a gray one, pixels are (H, W, 1) instead of (H, W, 3).
        reduce: 1, 2, 4 or 8: shrink each side while decoding.
    """
    decode = partial(decode_jpeg, gray=header.num_components == 1, reduce=reduce)
    try:
        return decode(data), False
    except CodecError:
        raise
    except ValueError as error:
        rejected = Rejected("damaged", str(error))
        skips = "extraneous" in str(error)
    # Of scans that follow each other, an end marker hides that some are missing: where the decoder has to be lenient,
    # the file's own must be there, and only a single scan is given one.
    if (skips and data.find(_EOI, header.scan_at) < 0) or (not skips and not header.is_baseline):
        raise rejected
    try:
        return decode(data if skips else _ended(data), strict=not skips), True
    except CodecError:
        raise
    except ValueError:
        raise rejected from None


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
    return PackedImage(data, width, height, mean, tuple(outcomes), parse_jpeg(data).kind, _is_uniform(pixels))


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


def _is_uniform(pixels: Pixels) -> bool:
    """Whether the values of each channel have a standard deviation below 2 of 255."""
    step = 1 + math.isqrt(pixels.shape[0] * pixels.shape[1] // _MANY_PIXELS)
    return max(spreads(np.ascontiguousarray(pixels[::step, ::step]))) < _UNIFORM_STD


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


def _decode_with_pillow(data: bytes, config: EncodeConfig) -> tuple[Pixels, list[str]]:
    """Return (H, W, 1) or (H, W, 3) upright pixels of the first frame, and what had to be done."""
    calling("Pillow")
    try:
        header = deep_header(data)
        # These Pillow does not open at all.
        if header is not None and header.is_float and header.num_channels > 1:
            _check_limits(header.width, header.height, config)
            return _from_deep(data, header, None, config)
        size = early_size(data)
        if size is not None:
            _check_limits(*size, config)
        with pillow_limits(config.max_pixels), open_image(data) as image:
            calling(f"Pillow ({image.format})")
            _check_limits(*image.size, config)
            first = ["first frame"] if cast("int", getattr(image, "n_frames", 1)) > 1 else []
            pixels, outcomes = (
                _from_deep(data, header, image, config) if header is not None else _to_pixels(image, config)
            )
            return pixels, [*first, *outcomes]
    except (Rejected, CodecError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Rejected("too many pixels", _first_line(error)) from None
    except Image.UnidentifiedImageError:
        raise why_not_opened(data) from None
    except MemoryError:
        raise
    # Pillow's plugins raise whatever their parsing runs into: struct.error, IndexError, SyntaxError, zlib.error ...
    except Exception as error:
        raise Rejected("damaged", f"{type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _to_pixels(image: Image.Image, config: EncodeConfig) -> tuple[Pixels, list[str]]:
    outcomes: list[str] = []
    if image.format == "JXL" and not getattr(image, "jpeg", None):
        # Its pixels come upright; what EXIF says is of the image that it was made of.
        image.info.pop("exif", None)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) not in (0, 1):
        outcomes.append("turned upright")
    mode = upright.mode
    if mode == "F":
        values = np.asarray(upright)[:, :, None]
        return to_pixels(values, DepthRange.parse(config.depth_range)), [*outcomes, "float to 8 bits"]
    if mode.startswith("I"):
        # What is neither PNG nor TIFF was brought to 16 bits by Pillow.
        return to_pixels(np.asarray(upright)[:, :, None], DepthRange()), [*outcomes, "16 bit to 8"]
    if upright.has_transparency_data:
        outcomes.append("flattened")
        layered = upright.convert("RGBA")
        background = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(background, layered)
    gray = mode in ("1", "L")
    pixels = np.asarray(upright.convert("L" if gray else "RGB"))
    return (pixels[:, :, None] if gray else pixels), outcomes


def _from_deep(
    data: bytes, header: DeepHeader, image: Image.Image | None, config: EncodeConfig
) -> tuple[Pixels, list[str]]:
    """Do what `_to_pixels` does, for a PNG or TIFF of more than 8 bits."""
    wanted = DepthRange.parse(config.depth_range)
    bits = min(wanted.bits, header.bits)
    is_color = image is not None and image.mode in ("LA", "RGB", "RGBA", "RGBX")
    if image is not None and header.num_channels > 1 and (bits == 16 or not is_color):
        # Pillow gives the upper 8 of color.
        pixels, outcomes = _to_pixels(image, config)
        return pixels, [*outcomes, "16 bit to 8"]
    # Loading a TIFF removes what it says.
    orientation = header.orientation if image is None or image.format == "TIFF" else image.getexif().get(0x0112, 1)
    values, is_upright = values_of(data, header, image)
    integers = f"{bits} of 16 bits to 8" if bits < 16 else "16 bit to 8"
    outcomes = ["float to 8 bits" if header.is_float else integers]
    if values.shape[2] == 4:
        outcomes.append("flattened")
    if 1 < orientation <= 8:
        outcomes.append("turned upright")
    return _orient(to_pixels(values, wanted, file_bits=header.bits), 1 if is_upright else orientation), outcomes
