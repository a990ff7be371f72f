"""Images that are kept as they are: what their headers say, and what a reader should know about them."""

from shards.config import EncodeConfig
from shards.ground.errors import Rejected
from shards.images.encode import PackedImage, encode_safely
from shards.images.formats import early_size, open_image, orientation_of, why_not_opened
from shards.images.isolation import Limits, run_codecs
from shards.images.jpeg import JpegError, is_jpeg, parse_jpeg
from shards.images.libraries import calling
from shards.sets.record import Flag, flag_name

__all__ = ["TALLIED", "look_at", "packed_image"]

TALLIED = Flag.NEEDS_ORIENTATION | Flag.NOT_BASELINE | Flag.NOT_RGB | Flag.NOT_JPEG | Flag.DAMAGED
"""What is counted in a manifest, since a loader must know of it before it starts."""

_LIMITS = Limits.of(EncodeConfig.max_pixels)


def packed_image(data: bytes, config: EncodeConfig) -> PackedImage:
    """Return an image as a packing wants it: encoded (`encode_safely`), or with annotations as it is.

    Raises:
        Rejected: not an image; what is kept as it is may be damaged behind its header.
        ValueError: a library that the settings need is not installed.
        PackError: the machine runs out of memory.
    """
    if not config.annotations:
        return encode_safely(data, config)
    if not data:
        raise Rejected("empty")
    _, _, flags, kind = look_at(data)
    width, height, orientation, name = run_codecs(_pillow_header, _LIMITS, data)
    return PackedImage(
        data,
        width,
        height,
        None,
        ("copied", *(flag_name(flag) for flag in TALLIED if flag & flags)),
        kind,
        flags=int(flags),
        orientation=orientation,
        extension="jpg" if is_jpeg(data) else name,
    )


def look_at(data: bytes) -> tuple[int, int, Flag, str]:
    """Return (width, height, flags, kind) from an image's header. Raises Rejected for what is not an image."""
    flags = Flag(0)
    if is_jpeg(data):
        try:
            header = parse_jpeg(data)
        except JpegError:
            return 0, 0, Flag.DAMAGED, "damaged"
        # A thumbnail in front of the scan has an end marker too.
        if data.rfind(b"\xff\xd9") < header.scan_at:
            flags |= Flag.DAMAGED
        if header.orientation != 1:
            flags |= Flag.NEEDS_ORIENTATION
        if not header.is_baseline:
            flags |= Flag.NOT_BASELINE
        if not header.is_ycbcr_or_gray:
            flags |= Flag.NOT_RGB
        return header.width, header.height, flags, header.kind
    width, height = run_codecs(_pillow_size, _LIMITS, data)
    return width, height, Flag.NOT_JPEG, "not JPEG"


def _pillow_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an image that is not a JPEG. Raises Rejected."""
    return early_size(data) or _pillow_header(data)[:2]


def _pillow_header(data: bytes) -> tuple[int, int, int, str]:
    """Return (width, height, orientation, name of the format), as Pillow has them. Raises Rejected."""
    calling("Pillow")
    try:
        with open_image(data) as image:
            return *image.size, orientation_of(image), (image.format or "image").lower()
    except MemoryError:
        raise
    # Its plugins raise whatever their parsing runs into.
    except Exception:
        raise why_not_opened(data) from None
