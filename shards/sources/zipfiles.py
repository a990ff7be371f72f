"""Zip archives of images."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.ground.errors import PackError, Rejected
from shards.sources.base import Input, Source, printable
from shards.storage.stores import SeekableFile, absolute, is_url, open_bytes

__all__ = ["ZipSource"]

_MAX_FILE_BYTES = 1 << 30


class ZipSource:
    """Members of one zip, stored or deflated.

    Args:
        path: path or URL.
        root: absolute path, for other processes.
    """

    def __init__(self, path: str, root: str = "") -> None:
        self.path = path
        self._root = root or absolute(path)
        self.is_remote = is_url(path)

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "zip", "path": self.path, "root": self._root}

    def inputs(self, spool: Path) -> Iterator[Input | Source]:
        """List every member but folders, in the archive's order."""
        del spool
        try:
            with zipfile.ZipFile(io.BufferedReader(SeekableFile(open_bytes(self._root)))) as archive:
                entries = archive.infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise PackError(
                f"{self.path} is not a whole zip ({error}): get the whole archive, or leave it out"
            ) from error
        for entry in entries:
            if not entry.is_dir():
                name = entry.filename.encode("utf-8", "surrogateescape")
                folder = entry.filename.rpartition("/")[0].rpartition("/")[2] or None
                yield Input(name, folder, None, entry.header_offset, entry.compress_size)

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
        except OSError as error:
            raise PackError(f"cannot read {self.path} ({error.strerror}): is it still there?") from error
        if len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        return _unpacked(data, flags=head[6], method=int.from_bytes(head[8:10], "little"))

    def describe(self, name: bytes) -> str:
        """Return the path of the archive and of the member in it."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def _unpacked(data: bytes, *, flags: int, method: int) -> bytes:
    if flags & 1:
        raise Rejected("unreadable", "encrypted")
    if method == zipfile.ZIP_STORED:
        return data
    if method != zipfile.ZIP_DEFLATED:
        raise Rejected("unsupported", f"zip compression method {method}")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(data, _MAX_FILE_BYTES)
    except zlib.error as error:
        raise Rejected("damaged", str(error)) from None
    if not unpacker.eof:
        raise Rejected("too many bytes" if unpacker.unconsumed_tail else "damaged", "does not unpack to its end")
    return unpacked
