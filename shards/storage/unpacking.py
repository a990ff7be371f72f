"""Unpacking of compressed files into local ones: every stream of a file, and nothing left over in silence."""

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import IO, Any, Protocol, cast

from shards.storage.stores import ByteFile

__all__ = ["COMPRESSIONS", "UnpackError", "unpack", "unpacked_head"]

# Small, since what is unpacked of it at once is held in memory.
_CHUNK = 1 << 16
_ZSTD_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


class UnpackError(ValueError):
    """The bytes are not whole compressed streams."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd_decompressor() -> Any:
    zstd: Any = import_module(_ZSTD_MODULE)
    # Archives of datasets are often written with windows (`--long`) above the library's own limit.
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})


COMPRESSIONS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": lambda: cast("_Decompressor", zlib.decompressobj(16 + zlib.MAX_WBITS)),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstd": _zstd_decompressor,
}
"""What unpacks one stream of each kind, by the names of shards.images.sniff."""


def unpack(file: ByteFile, kind: str, target: IO[bytes]) -> None:
    """Write the content of all compressed streams of a file, one after the other.

    Args:
        file: what to read.
        kind: one of COMPRESSIONS.
        target: what to write to.

    Raises:
        UnpackError: damaged, cut short, or followed by bytes that are no such stream; says at which byte.
        OSError: the file cannot be read.
    """
    at, stream, begin = 0, COMPRESSIONS[kind](), 0
    while at < file.size:
        data = file.read(at, _CHUNK)
        if not data:
            raise UnpackError(f"ends at byte {at} of {file.size}")
        at += len(data)
        while data:
            if stream.eof:
                # Tapes are padded with zeros, and so are xz's files.
                data = data.lstrip(b"\0")
                if not data:
                    break
                stream, begin = COMPRESSIONS[kind](), at - len(data)
            try:
                unpacked = stream.decompress(data)
            except Exception as error:
                # What each library raises for damage is its own: zlib.error, OSError, LZMAError, ZstdError.
                what = (
                    "is damaged"
                    if begin == 0
                    else f"is followed from byte {begin} on by what is not {kind}, or damaged"
                )
                raise UnpackError(f"the {kind} stream {what}: {error}") from error
            target.write(unpacked)
            data = stream.unused_data if stream.eof else b""
    if not stream.eof:
        which = (
            "is cut short" if begin == 0 else f"is followed from byte {begin} on by one that is cut short, or by none"
        )
        raise UnpackError(f"the {kind} stream {which}")


class _Enough(Exception):  # noqa: N818 - an end, not an error
    """There are as many bytes as were asked for."""


class _Head:
    """Keeps the first bytes that are written to it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data
        if len(self.data) >= self._count:
            raise _Enough


def unpacked_head(file: ByteFile, kind: str, count: int) -> bytes:
    """Return the first bytes of what `unpack` would write.

    Raises:
        UnpackError: damaged before that.
        OSError: the file cannot be read.
    """
    head = _Head(count)
    with suppress(_Enough):
        unpack(file, kind, cast("IO[bytes]", head))
    return head.data[:count]
