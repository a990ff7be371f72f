"""Kinds of files by their first bytes: images that Pillow reads, and what holds many files."""

import re

from shards.images.data_files import data_file

__all__ = ["SNIFFED_BYTES", "container", "is_image", "unread_image"]

SNIFFED_BYTES = 512
"""How many first bytes tell a kind."""

_IMAGE_STARTS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF, little- and big-endian, and BigTIFF
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cJXL \r\n\x87\n",  # JPEG XL
    b"\xff\x0a",
    b"icns",
    b"8BPS",  # Photoshop
    b"DDS |",
    b"qoif",
    b"\x01\xda\x00",  # SGI
    b"\x01\xda\x01",
    b"\x59\xa6\x6a\x95",  # Sun raster
)
_BITMAP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_HEIF_BRANDS = (b"avif", b"avis", *_HEIC_BRANDS)
_PNM = re.compile(
    rb"P(?:[1-6f]\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*\d+\s|7\n(?:#|WIDTH|HEIGHT|DEPTH|MAXVAL))", re.IGNORECASE
)
_ICON = re.compile(rb"\x00\x00[\x01\x02]\x00[\x01-\xff]\x00", re.DOTALL)
_PCX = re.compile(rb"\n[\x00\x02-\x05]\x01[\x01\x02\x04\x08]", re.DOTALL)
_BEGIN_PATTERNS = frozenset((b"P", b"p", b"\0", b"\n"))

_CONTAINERS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\x1f\x9d": "compress (.Z)",
    b"LZIP": "lzip",
    b"PK\3\4": "zip",
    b"PK\5\6": "zip",
    b"PK\7\x08": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
    b"070701": "cpio",
    b"070707": "cpio",
    b"!<arch>\n": "ar",
    b"xar!": "xar",
    b"SQLite format 3\0": "SQLite",
}
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)


def is_image(head: bytes) -> bool:
    """Return whether a file's first bytes, at least 32 of them, are those of an image's format; TGA's have no mark."""
    if head.startswith(_IMAGE_STARTS):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _HEIF_BRANDS
    if head[:2] == b"BM":
        # Texts begin so too.
        return int.from_bytes(head[14:18], "little") in _BITMAP_HEADERS
    return head[:1] in _BEGIN_PATTERNS and any(pattern.match(head) is not None for pattern in (_PNM, _ICON, _PCX))


def unread_image(head: bytes) -> str | None:
    """Return the name of an image's format that Pillow does not read by itself; None for others."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return "HEIC"
    return "JPEG XL" if head.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")) else None


def container(head: bytes) -> str | None:
    """Return the name of the format of an archive, a table, a data file or compressed data; None for anything else.

    Args:
        head: the first SNIFFED_BYTES bytes.
    """
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "tar"
    if _ZSTD_SKIPPABLE.match(head):
        return "zstd"
    return data_file(head) or next((name for start, name in _CONTAINERS.items() if head.startswith(start)), None)


def _is_old_tar(head: bytes) -> bool:
    """Whether a block is the header of a tar of the seventh edition, which has no mark but its checksum."""
    digits = head[148:156].strip(b"\0 ")
    if len(head) < 512 or not digits or digits.strip(b"01234567"):
        return False
    fields = head[:148] + head[156:512]
    total = sum(fields) + 8 * 0x20
    # Some summed signed characters.
    return int(digits, 8) in (total, total - 256 * sum(byte >> 7 for byte in fields))
