"""Digests and checksums: xxh3 for whole contents, CRC-32C for single images."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import google_crc32c
import xxhash

from shards.ground.arrays import Encoded

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "RunningDigest",
    "crc32c",
    "digest",
    "digest_file",
    "digest_number",
    "masked_crc32c",
    "running_digest",
    "short_digest",
]

_READ_BYTES = 8 << 20


class RunningDigest(Protocol):
    """A digest that grows with what it is given."""

    def update(self, data: "ReadableBuffer", /) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the digest of everything so far, in hex."""
        ...


def running_digest() -> RunningDigest:
    """Begin an xxh3_128."""
    return xxhash.xxh3_128()


def digest(*parts: "ReadableBuffer") -> str:
    """Return xxh3_128 of some bytes, one part after the other, in hex."""
    whole = xxhash.xxh3_128()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def digest_file(path: Path) -> str:
    """Return xxh3_128 of a file, in hex. Raises OSError."""
    whole = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            whole.update(data)
    return whole.hexdigest()


def digest_number(data: "ReadableBuffer") -> int:
    """Return xxh3_128 of some bytes as a number."""
    return xxhash.xxh3_128_intdigest(data)


def short_digest(data: "ReadableBuffer") -> str:
    """Return xxh3_64 of some bytes, in hex: for names of files."""
    return xxhash.xxh3_64_hexdigest(data)


def crc32c(data: bytes | Encoded) -> int:
    """Return CRC-32C (Castagnoli) of some bytes. Not of a memoryview: the library takes none."""
    return google_crc32c.value(data)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - it has no types


def masked_crc32c(data: bytes) -> int:
    """Return CRC-32C as TFRecord files have it: rotated by 15 bits, and a constant added (TensorFlow, crc32c.h)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
