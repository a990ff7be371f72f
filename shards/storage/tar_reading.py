"""Members of tar archives, one or several in a file, of every flavor that common tools write.

v7, ustar, GNU, PAX (also Solaris' and with global headers) and star; links to other members, sparse files, sizes in
base 256.
Sources: POSIX.1-2017, pax; "Basic Tar Format" of GNU tar's manual; its tar.h.
"""

import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from shards.storage.stores import ByteFile, SeekableFile
from shards.storage.tar import BLOCK, EndOfTar, Member, TarError, parse_header

__all__ = ["SPARSE", "TarEntry", "members", "read_member", "tar_reader"]

SPARSE = -2
"""Size of a member with holes, whose offset is that of its first header."""

_MAX_EXTENSION_BYTES = 1 << 24
_MAX_SPARSE_BYTES = 1 << 30
_SCAN_BYTES = 1 << 20
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")
# Volume labels, access control lists, star's inode data: they describe, and are no members.
_DESCRIPTIONS = (b"V", b"A", b"I")
_FILES = (b"0", b"\0")
_FOLDERS = (b"5", b"D")
_LINKS = (b"1", b"2")
_NO_FILES = {
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"M": "the rest of a file that begins on another volume",
}
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_MOST_LINKS = 8


class TarEntry(NamedTuple):
    """A member that is no folder."""

    name: bytes
    offset: int
    """First byte of its data."""
    size: int
    """Bytes there; SPARSE, or -1 for what is not a file."""
    problem: str = ""
    """What it is where it is not a file."""

    @property
    def is_file(self) -> bool:
        """Whether it can be read."""
        return not self.problem


class _Raw(NamedTuple):
    """A member as it is written."""

    name: bytes
    begin: int
    """Its first header."""
    header_at: int
    """The header that names its type."""
    offset: int
    size: int
    type: bytes
    link: bytes
    sparse: list[tuple[bytes, bytes]]
    """PAX fields of a sparse file, in their order."""


def tar_reader(file: ByteFile, is_remote: bool) -> SeekableFile:
    """Return what reads headers: over a network together with what lies between them."""
    return SeekableFile(file, 4 << 20 if is_remote else 1 << 12)


def members(reader: SeekableFile) -> Iterator[TarEntry]:
    """Return every member but folders, of all archives in a file; a link to a member is that member under another name.

    Raises:
        TarError: damaged, cut short, or followed by bytes that are no archive; says at which byte.
    """
    size = reader.file.size
    places: dict[bytes, _Raw] | None = None
    for raw in _walk(reader, size):
        if raw.type in _LINKS:
            if places is None:
                # Only archives with links need to be held in memory.
                places = {_normal(other.name): other for other in _walk(reader, size)}
            yield _linked(raw, places)
        else:
            yield _entry(raw)


def read_member(file: ByteFile, offset: int, size: int) -> bytes:
    """Return the bytes of a file's entry; fewer where the archive is shorter than when it was listed.

    Raises:
        TarError: a damaged map of a sparse file.
    """
    return _read_sparse(file, offset) if size == SPARSE else file.read(offset, size)


def _entry(raw: _Raw) -> TarEntry:
    if raw.type in _NO_FILES:
        return TarEntry(raw.name, -1, -1, _NO_FILES[raw.type])
    if raw.type == b"S" or raw.sparse:
        return TarEntry(raw.name, raw.begin, SPARSE)
    return TarEntry(raw.name, raw.offset, raw.size)


def _normal(name: bytes) -> bytes:
    return posixpath.normpath(name).lstrip(b"/")


def _linked(raw: _Raw, places: dict[bytes, _Raw]) -> TarEntry:
    """Return what a hard or symbolic link leads to, under its own name."""
    found = raw
    for _ in range(_MOST_LINKS):
        # Hard links name members from the top, symbolic ones from where they are.
        folder = b"" if found.type == b"1" else posixpath.dirname(found.name)
        target = places.get(_normal(posixpath.join(folder, found.link)))
        if target is None:
            shown = found.link.decode("utf-8", "backslashreplace")
            return TarEntry(raw.name, -1, -1, f"a link to {shown}, which is not a file in the archive")
        if target.type not in _LINKS:
            return _entry(target)._replace(name=raw.name)
        found = target
    return TarEntry(raw.name, -1, -1, "a link that leads round in a circle")


def _walk(reader: SeekableFile, file_size: int, at: int = 0) -> Iterator[_Raw]:
    """Return every member but folders and descriptions, beginning with the header at a byte."""
    begin, extended, sparse = at, dict[bytes, bytes](), list[tuple[bytes, bytes]]()
    while True:
        try:
            header = parse_header(reader.read_at(at, BLOCK))
        except EndOfTar:
            if at != begin:
                raise TarError(f"ends after a header that describes a member, at byte {at}") from None
            following = _next_archive(reader, file_size, at)
            if following is None:
                return
            begin = at = following
            continue
        except TarError as error:
            raise TarError(f"{error}, at byte {at}") from None
        start, size = _data_of(reader, at, header, extended)
        if start + size > file_size:
            name = header.name.decode("utf-8", "backslashreplace")
            raise TarError(f"{name} at byte {at} is cut short")
        end = start + size + -size % BLOCK
        if header.type in _EXTENSIONS:
            if size > _MAX_EXTENSION_BYTES:
                raise TarError(f"a header of {size} bytes at byte {start}")
            _extend(header.type, reader.read_at(start, size), extended, sparse)
            # A global header describes the archive, not the member behind it.
            begin = end if header.type == b"g" and begin == at else begin
            at = end
            continue
        name = extended.get(b"GNU.sparse.name", extended.get(b"path", header.name)) if extended else header.name
        # The seventh edition had no type for folders.
        is_folder = header.type in _FOLDERS or (name.endswith(b"/") and not size)
        if not is_folder and header.type not in _DESCRIPTIONS:
            link = extended.get(b"linkpath", header.link)
            yield _Raw(name, begin, at, start, size, header.type, link, sparse)
        begin = at = end
        extended, sparse = {}, []


def _data_of(reader: SeekableFile, at: int, header: Member, extended: dict[bytes, bytes]) -> tuple[int, int]:
    """Return where a member's data begin and how many bytes they are. Raises TarError."""
    start = at + BLOCK
    if header.type in _FILES and not extended:
        return start, header.size
    if header.type == b"S":
        # Old GNU's map of a sparse file continues in blocks behind the header.
        more = reader.read_at(at, BLOCK)[482]
        while more:
            block = reader.read_at(start, BLOCK)
            if len(block) < BLOCK:
                raise TarError(f"a sparse file's map at byte {start} is cut short")
            more, start = block[504], start + BLOCK
    try:
        size = header.size if header.type in _EXTENSIONS else int(extended.get(b"size", header.size))
    except ValueError:
        raise TarError(f"a PAX header's size {extended[b'size']!r} is not a number, at byte {at}") from None
    # Some writers state the size of what a link leads to, or of a folder, and some store a hard link's data.
    if header.type in _NO_DATA and size and _is_boundary(reader.read_at(start, BLOCK)):
        return start, 0
    return start, size


def _is_boundary(block: bytes) -> bool:
    """Whether a block is where a member may end: another header, or the end."""
    try:
        parse_header(block)
    except EndOfTar:
        return True
    except TarError:
        return not block
    return True


def _next_archive(reader: SeekableFile, file_size: int, end: int) -> int | None:
    """Return where another archive begins behind the end of one; None where there are only zeros. Raises TarError."""
    at = end
    while at < file_size:
        data = reader.read_at(at, _SCAN_BYTES)[:_SCAN_BYTES]
        rest = data.lstrip(b"\0")
        if rest or not data:
            at += len(data) - len(rest)
            break
        at += len(data)
    if at >= file_size:
        return None
    begin = at - at % BLOCK
    try:
        parse_header(reader.read_at(begin, BLOCK))
    except (TarError, EndOfTar):
        left = file_size - at
        raise TarError(
            f"the archive ends at byte {end}, and the {left} bytes from byte {at} on are not another one"
        ) from None
    return begin


def _extend(kind: bytes, data: bytes, extended: dict[bytes, bytes], sparse: list[tuple[bytes, bytes]]) -> None:
    """Note what an extended header says of the next member."""
    if kind in (b"L", b"K"):
        extended[b"path" if kind == b"L" else b"linkpath"] = data.rstrip(b"\0")
        return
    while kind in (b"x", b"X") and data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise TarError("a damaged PAX header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        data = data[int(length) :]
        if key in (b"path", b"linkpath", b"size", b"GNU.sparse.name"):
            extended[key] = value
        if key.startswith(b"GNU.sparse."):
            sparse.append((key.removeprefix(b"GNU.sparse."), value))


def _read_sparse(file: ByteFile, begin: int) -> bytes:
    """Return a sparse file with its holes filled by zeros."""
    reader = SeekableFile(file, 1 << 12)
    raw = next(_walk(reader, file.size, begin))
    fields = dict(raw.sparse)
    try:
        if raw.type == b"S":
            size, pieces, start = *_old_map(reader, raw), raw.offset
        else:
            size = int(fields.get(b"realsize", fields.get(b"size", b"")))
            pieces, start = _pax_map(reader, raw, fields)
        if not 0 <= size <= _MAX_SPARSE_BYTES or any(n < 0 or not 0 <= at <= size - n for at, n in pieces):
            raise ValueError(size)
    except ValueError as error:
        raise TarError(f"a damaged map of a sparse file at byte {begin} ({error})") from None
    whole = bytearray(size)
    for at, count in pieces:
        whole[at : at + count] = file.read(start, count)
        start += count
    return bytes(whole)


def _old_map(reader: SeekableFile, raw: _Raw) -> tuple[int, list[tuple[int, int]]]:
    """Return the size and the (offset, count) of each piece of GNU's old format."""
    header = reader.read_at(raw.header_at, BLOCK)
    texts = [header[386:482], *(reader.read_at(at, 504) for at in range(raw.header_at + BLOCK, raw.offset, BLOCK))]
    fields = [text[i : i + 12] for text in texts for i in range(0, len(text), 12)]
    numbers = [_octal(field) for field in fields if field.strip(b"\0 ")]
    return _octal(header[483:495]), list(zip(numbers[::2], numbers[1::2], strict=True))


def _octal(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax_map(reader: SeekableFile, raw: _Raw, fields: dict[bytes, bytes]) -> tuple[list[tuple[int, int]], int]:
    """Return the (offset, count) of each piece, and where the data begin, of PAX formats 0.0, 0.1 and 1.0."""
    if b"map" in fields:
        numbers = [int(text) for text in fields[b"map"].split(b",") if text]
        return list(zip(numbers[::2], numbers[1::2], strict=True)), raw.offset
    if fields.get(b"major") != b"1":
        columns = ([int(value) for key, value in raw.sparse if key == name] for name in (b"offset", b"numbytes"))
        return list(zip(*columns, strict=True)), raw.offset
    # Version 1.0 writes the numbers in front of the data, one per line: how many pieces, then offset and count of each.
    lines: list[bytes] = []
    at, rest = raw.offset, b""
    while not lines or len(lines) < 1 + 2 * int(lines[0]):
        if at >= raw.offset + raw.size:
            raise ValueError("the map has no end")
        *more, rest = (rest + reader.read_at(at, BLOCK)).split(b"\n")
        lines += more
        at += BLOCK
    numbers = [int(line) for line in lines[1 : 1 + 2 * int(lines[0])]]
    return list(zip(numbers[::2], numbers[1::2], strict=True)), at
