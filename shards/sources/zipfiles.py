"""Zip archives of images."""

import bz2
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.ground.units import counted
from shards.sources.base import Aside, Input, Source, folder_of, printable
from shards.sources.samples import SeveralImages, sifted
from shards.storage.stores import ByteFile, SeekableFile, absolute, is_url, open_bytes
from shards.storage.unpacking import COMPRESSIONS

__all__ = ["ZipSource"]

_MAX_FILE_BYTES = 1 << 30
_MAX_TAIL_BYTES = 22 + 0xFFFF


class ZipSource:
    """Members of one zip, stored or compressed by deflate, bzip2, LZMA, xz or zstd.

    Args:
        path: path or URL.
        options: what is wanted.
        root: absolute path, for other processes.
    """

    def __init__(self, path: str, options: SourceOptions | None = None, root: str = "") -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._root = root or absolute(path)
        self.is_remote = is_url(path)

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "zip", "path": self.path, "root": self._root}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Aside]:
        """List every member but folders, sorted by name within the archive's folders."""
        del spool
        file = open_bytes(self._root)
        try:
            with zipfile.ZipFile(io.BufferedReader(SeekableFile(file))) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            self._refuse_others(file, min((entry.header_offset for entry in archive.infolist()), default=0))
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise PackError(
                f"{self.path} is not a whole zip ({error}): get the whole archive, or leave it out"
            ) from error
        self._refuse_unreadable(entries)
        several = SeveralImages()
        entries.sort(key=lambda entry: (entry.filename, entry.header_offset))
        names = [entry.filename.encode("utf-8", "surrogateescape") for entry in entries]
        places = {name: (entry.header_offset, entry.compress_size) for name, entry in zip(names, entries, strict=True)}
        inputs = sifted(names, self._options.members, several, lambda name: self._begin(name, *places[name]))
        for entry, item in zip(entries, inputs, strict=True):
            if isinstance(item, Aside):
                yield item
            else:
                yield Input(item, folder_of(item), None, entry.header_offset, entry.compress_size)
        several.refuse(self.path)

    def _refuse_others(self, file: ByteFile, first: int) -> None:
        """Refuse bytes in front of the first member or behind the end: another archive that no one would look at."""
        end = file.size - min(file.size, _MAX_TAIL_BYTES)
        tail = file.read(end, _MAX_TAIL_BYTES)
        at = tail.rfind(b"PK\5\6")
        end += at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little")
        head = file.read(0, 4)
        # A program that unpacks itself, and the mark of an archive that was meant for several disks, belong to it.
        if first > 0 and not head.startswith((b"MZ", b"#!", b"\x7fELF", b"PK\7\x08", b"PK00")):
            raise zipfile.BadZipFile(f"{first} bytes in front of its first member, which may be another archive")
        if end < file.size:
            raise zipfile.BadZipFile(f"{file.size - end} bytes from byte {end} on, behind its end")

    def _refuse_unreadable(self, entries: list[zipfile.ZipInfo]) -> None:
        """Refuse an archive with members that cannot be unpacked."""
        for what, unreadable in (
            ("encrypted", [entry for entry in entries if entry.flag_bits & 1]),
            (
                "compressed by a method that is not read",
                [each for each in entries if each.compress_type not in _METHODS],
            ),
        ):
            if unreadable:
                method = _NAMES.get(unreadable[0].compress_type, f"method {unreadable[0].compress_type}")
                raise PackError(
                    f"{self.path}: {counted(len(unreadable), 'member')}, such as {unreadable[0].filename!r}, cannot "
                    f"be read: {what}{f' ({method})' if what != 'encrypted' else ''}. Unpack it, or write it by deflate"
                )

    def _begin(self, name: bytes, offset: int, size: int) -> bytes:
        try:
            return self.read(name, offset, size)
        except Rejected:
            return b""

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of a member, unpacked."""
        file = open_bytes(self._root)
        try:
            # The header's own name and extra field may be longer than the directory's.
            head = file.read(offset, 30)
            if len(head) < 30 or head[:4] != b"PK\3\4":
                raise Rejected("damaged", "the archive has no member at this place")
            skip = 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            data = file.read(offset + skip, size)
            # Written where the sizes were not known before: a mark that may be missing, then the checksum.
            behind = file.read(offset + skip + size, 8) if head[6] & 8 else b""
        except OSError as error:
            raise PackError(f"cannot read {self.path} ({error.strerror}): is it still there?") from error
        if len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        unpacked = _unpacked(data, flags=head[6], method=int.from_bytes(head[8:10], "little"))
        checksum = behind.removeprefix(b"PK\7\x08")[:4] if head[6] & 8 else head[14:18]
        if zlib.crc32(unpacked) != int.from_bytes(checksum, "little"):
            raise Rejected("damaged", "its checksum in the archive does not match")
        return unpacked

    def describe(self, name: bytes) -> str:
        """Return the path of the archive and of the member in it."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def _unpacked(data: bytes, *, flags: int, method: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return data
    try:
        stream, data = _METHODS[method](data)
        unpacked = stream.decompress(data, _MAX_FILE_BYTES)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, IndexError, KeyError) as error:
        raise Rejected("damaged", str(error)) from None
    # LZMA marks its end only where a flag says so.
    if not stream.eof and (method != zipfile.ZIP_LZMA or flags & 2):
        raise Rejected(
            "too many bytes" if len(unpacked) >= _MAX_FILE_BYTES else "damaged", "does not unpack to its end"
        )
    return unpacked


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _lzma(data: bytes) -> tuple[_Unpacker, bytes]:
    """Return what unpacks LZMA in a zip (APPNOTE 5.8.8), and its data: after two bytes of version and two of size."""
    size = int.from_bytes(data[2:4], "little")
    packed, dictionary = data[4], int.from_bytes(data[5:9], "little")
    rest, literal_bits = divmod(packed, 9)
    position_bits, literal_position_bits = divmod(rest, 5)
    filters: list[dict[str, int]] = [
        {
            "id": lzma.FILTER_LZMA1,
            "dict_size": dictionary,
            "lc": literal_bits,
            "lp": literal_position_bits,
            "pb": position_bits,
        }
    ]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), data[4 + size :]


_METHODS: dict[int, Callable[[bytes], tuple[_Unpacker, bytes]]] = {
    zipfile.ZIP_STORED: lambda data: (cast("_Unpacker", zlib.decompressobj()), data),
    zipfile.ZIP_DEFLATED: lambda data: (cast("_Unpacker", zlib.decompressobj(-zlib.MAX_WBITS)), data),
    zipfile.ZIP_BZIP2: lambda data: (bz2.BZ2Decompressor(), data),
    zipfile.ZIP_LZMA: _lzma,
    93: lambda data: (cast("_Unpacker", COMPRESSIONS["zstd"]()), data),
    95: lambda data: (lzma.LZMADecompressor(), data),
}
_NAMES = {9: "deflate64, as Windows writes files above 2 GB", 98: "PPMd", 99: "AES encryption"}
"""What methods are called that are not read (APPNOTE 4.4.5)."""
