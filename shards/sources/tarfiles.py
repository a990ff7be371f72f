"""Tar archives, plain or compressed: of folders of images, or WebDataset shards."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from shards.ground.arrays import LabelSets
from shards.ground.errors import PackError, Rejected
from shards.sets.local import LocalShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest
from shards.sources.base import Found, Input, LabelSet, Source, printable
from shards.storage.file_kinds import IMAGE_SUFFIXES
from shards.storage.stores import ByteFile, SeekableFile, absolute, is_url, open_bytes
from shards.storage.tar import BLOCK, EndOfTar, TarError, parse_header

__all__ = ["TarSource", "members"]

_OPENERS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAX_EXTENSION_BYTES = 1 << 20
_MAX_LABEL_BYTES = 1 << 10
_REGULAR = (b"0", b"\0", b"7")


class _TarEntry(NamedTuple):
    name: bytes
    offset: int
    size: int
    is_file: bool


class TarSource:
    """Members of one tar.

    Members next to each other whose names agree up to the first dot of the last part are one sample, as in WebDataset:
    those with an image's extension are inputs, `.cls` is their label, the rest is left aside. A member that stands
    alone is an input whatever its extension.

    Args:
        path: path or URL.
        spool: the unpacked tar, if `path` is compressed.
        root: absolute path, for other processes.
    """

    def __init__(self, path: str, spool: Path | None = None, root: str = "") -> None:
        self.path = path
        self._root = root or absolute(path)
        self._spool = spool
        self._opener = next((opener for suffix, opener in _OPENERS.items() if path.lower().endswith(suffix)), None)
        self.is_remote = is_url(path) and self._opener is None

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        spool = {} if self._spool is None else {"spool": self._spool.name}
        return {"kind": "tar", "path": self.path, "root": self._root, **spool}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found]:
        """List the members that are images or stand alone, in the archive's order."""
        manifest = self._manifest()
        names = () if manifest is None else manifest.class_names
        try:
            if self._opener is not None:
                self._unpack(spool)
                self._spool = spool
            file = self._file()
            sets = None if manifest is None or not manifest.has_label_sets else self._label_sets(manifest)
            for number, group in enumerate(_samples(members(file, self.is_remote))):
                own = None if sets is None else _set_of(sets[number], names)
                yield from _inputs_of(group, file, names, own)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, TarError) as error:
            raise PackError(
                f"{self.path} cannot be read to its end ({error}): its images would be lost silently; "
                "get the whole archive, or leave it out"
            ) from error

    def _unpack(self, spool: Path) -> None:
        assert self._opener is not None
        raw: IO[bytes] = io.BufferedReader(SeekableFile(open_bytes(self._root)))
        with self._opener(raw, "rb") as unpacked, spool.open("wb") as target:
            shutil.copyfileobj(cast("IO[bytes]", unpacked), target, 1 << 20)

    def _manifest(self) -> Manifest | None:
        """Return what says what labels mean, if this is a shard that make-shards wrote."""
        folder = Path(self._root).parent
        if is_url(self._root) or not (folder / MANIFEST_NAME).exists():
            return None
        try:
            return Manifest.read(folder)
        except ValueError:
            return None

    def _label_sets(self, manifest: Manifest) -> LabelSets | None:
        """Return the classes of each sample, if the manifest names this shard."""
        path = Path(self._root)
        numbers = [number for number, entry in enumerate(manifest.shards) if entry.name == path.name]
        return LocalShardSet(path.parent, manifest).label_sets(numbers[0]) if numbers else None

    def _file(self) -> ByteFile:
        return open_bytes(str(self._spool) if self._spool is not None else self._root)

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of a member."""
        if size < 0:
            raise Rejected("not a file", "a link or a device inside the archive")
        try:
            data = self._file().read(offset, size)
        except OSError as error:
            raise PackError(f"cannot read {self.path} ({error.strerror}): is it still there?") from error
        if len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        return data

    def describe(self, name: bytes) -> str:
        """Return the path of the archive and of the member in it."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def members(file: ByteFile, is_remote: bool) -> Iterator[_TarEntry]:
    """Return every member but folders, with GNU's and PAX's long names.

    Raises:
        TarError: damaged, or cut short.
    """
    reader = SeekableFile(file, 4 << 20 if is_remote else 1 << 12)
    at, extended = 0, dict[bytes, bytes]()
    while True:
        try:
            header = parse_header(reader.read_at(at, BLOCK))
        except EndOfTar:
            return
        except TarError as error:
            raise TarError(f"{error}, at byte {at}") from None
        start = at + BLOCK
        size = int(extended.get(b"size", header.size))
        if start + size > file.size:
            raise TarError(f"{printable(header.name)} at byte {at} is cut short")
        at = start + size + -size % BLOCK
        if header.type in (b"L", b"K", b"x", b"X", b"g"):
            if size > _MAX_EXTENSION_BYTES:
                raise TarError(f"a header of {size} bytes at byte {start}")
            extended.update(_extension(header.type, reader.read_at(start, size)))
            continue
        name = extended.get(b"path", header.name)
        extended.clear()
        if header.type != b"5" and not name.endswith(b"/"):
            yield _TarEntry(name, start, size, header.type in _REGULAR)


def _extension(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """Return the fields of the next member that an extended header overrides."""
    if kind == b"L":
        return {b"path": data.rstrip(b"\0")}
    fields: dict[bytes, bytes] = {}
    while kind in (b"x", b"X") and data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise TarError("a damaged PAX header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        data = data[int(length) :]
        if key in (b"path", b"size"):
            fields[key] = value
    return fields


def _key(name: bytes) -> bytes:
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _samples(listing: Iterator[_TarEntry]) -> Iterator[list[_TarEntry]]:
    group: list[_TarEntry] = []
    key = None
    for member in listing:
        # Hidden names have no key; each stands alone.
        own = _key(member.name)
        if group and (own != key or not own.rpartition(b"/")[2]):
            yield group
            group = []
        group.append(member)
        key = own
    if group:
        yield group


def _set_of(row: LabelSets, names: tuple[str, ...]) -> LabelSet:
    present, unsure = (tuple(names[i] for i in np.flatnonzero(row == value)) for value in (1, -1))
    return LabelSet(present, unsure)


def _inputs_of(
    group: list[_TarEntry], file: ByteFile, names: tuple[str, ...], label: LabelSet | str | int | None
) -> Iterator[Input]:
    suffixes = [member.name.rpartition(b".")[2].decode("ascii", "replace").lower() for member in group]
    images = [member for member, suffix in zip(group, suffixes, strict=True) if suffix in IMAGE_SUFFIXES]
    for member, suffix in zip(group, suffixes, strict=True):
        if suffix == "cls" and 0 < member.size <= _MAX_LABEL_BYTES:
            label = _label(file.read(member.offset, member.size), names)
    for member in images or group:
        folder = os.fsdecode(member.name.rpartition(b"/")[0].rpartition(b"/")[2]) or None
        yield Input(member.name, folder, label, member.offset, member.size if member.is_file else -1)


def _label(data: bytes, names: tuple[str, ...]) -> str | int | None:
    text = data.decode("utf-8", "backslashreplace").strip()
    if not text.isdecimal():
        return text or None
    number = int(text)
    if names:
        return names[number] if number < len(names) else None
    return number
