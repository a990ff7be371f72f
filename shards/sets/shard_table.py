"""Table of a set's shards: what the manifest says of each of them, in columns that all processes of a machine share.

A million shards are a million lines of JSON, 460 MB, and as objects 1.6 GB per process. Here a column is an array in
one .npz that is mapped; `numpy.load` opens the file as well.
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, repeat
from typing import IO, Any, Self, cast, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from shards.ground.arrays import Indices
from shards.ground.memory import SharedBytes

__all__ = ["ShardEntry", "ShardTable"]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: a tar and the files beside it."""

    name: str
    """File name of the tar; the files beside it share its stem."""
    num_samples: int
    """Samples packed."""
    num_rejected: int
    """Inputs planned for this shard that could not be packed."""
    num_bytes: int
    """Size of the tar."""
    digests: dict[str, str]
    """xxh3_128, in hex, of the tar and of each file beside it, by suffix."""
    max_width: int
    """Widest image in pixels."""
    max_height: int
    """Highest image in pixels."""
    max_bytes: int
    """Largest image in bytes."""
    outcomes: dict[str, int]
    """Packed samples by what was done to them."""
    rejections: dict[str, int]
    """Rejected inputs by reason."""
    jpegs: dict[str, int] = field(default_factory=dict[str, int])
    """Packed samples by kind (shards.images.jpeg, JpegHeader.kind); empty in shards of earlier versions: unknown."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed JSON. Raises KeyError when a field is missing."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name != "jpegs"}
        return cls(**known, jpegs=values.get("jpegs", {}))

    @property
    def stem(self) -> str:
        """Name without `.tar`."""
        return self.name.removesuffix(".tar")


_NUMBERS = {
    "num_samples": np.dtype("<u4"),
    "num_rejected": np.dtype("<u4"),
    "num_bytes": np.dtype("<u8"),
    "max_width": np.dtype("<u4"),
    "max_height": np.dtype("<u4"),
    "max_bytes": np.dtype("<u4"),
}
_TALLIES = ("outcomes", "rejections", "jpegs")
_COUNT = np.dtype("<u4")
_NO_COUNT = 0xFFFFFFFF
_DIGEST_BYTES = 16
_NO_DIGEST = bytes(_DIGEST_BYTES)
_AT_ONCE = 1 << 12  # rows that are Python objects at a time
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first day: the same shards give the same bytes
_LOCAL_HEADER_BYTES = 30

Columns = dict[str, NDArray[Any]]


class ShardTable(Sequence[ShardEntry]):
    """The shards of a set in order. A shard is a ShardEntry, made when it is asked for; of all shards, ask for columns.

    Columns by name: those numbers of a ShardEntry, `name` (UTF-8), and for each key of its mappings `digests/.tar` (16
    bytes, 0: none), `outcomes/copied` (4294967295: not in the mapping) and so on.

    Pickled, a large table is a path: other processes of this machine share its memory (shards.ground.memory).

    Args:
        npz: an uncompressed .npz of the columns.

    Raises:
        ValueError: it is not one.
    """

    def __init__(self, npz: SharedBytes) -> None:
        self.npz = npz
        try:
            self._columns = _open_columns(npz.view)
            self._names = self._columns["name"]
            lengths = {len(column) for column in self._columns.values()}
            is_whole = lengths == {len(self._names)} and _NUMBERS.keys() <= self._columns.keys()
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a table of shards: {error}") from error
        if not is_whole:
            raise ValueError("not a table of shards: columns are missing, or not of one length")

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> Self:
        """Build from shards. Raises ValueError: a digest is not one, or a number is too large."""
        rows = iter(entries)
        return cls.parsed([vars(entry) for entry in chunk] for chunk in iter(lambda: list(islice(rows, _AT_ONCE)), []))

    @classmethod
    def parsed(cls, chunks: Iterable[Sequence[Mapping[str, Any]]]) -> Self:
        """Build from parsed JSON, chunk by chunk. Raises KeyError, TypeError, ValueError: a field is wrong."""
        return cls._made([_columns_of(chunk) for chunk in chunks] or [_columns_of([])])

    @classmethod
    def joined(cls, tables: Iterable["ShardTable"]) -> Self:
        """Return the shards of some tables, table after table."""
        return cls._made([table._columns for table in tables])

    @classmethod
    def _made(cls, parts: Sequence[Columns]) -> Self:
        return cls(SharedBytes.of(_to_npz(_concatenated(parts)), name="moco-fast-shards"))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (type(self), (self.npz,))

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[ShardEntry, ...]: ...

    def __getitem__(self, index: int | slice) -> ShardEntry | tuple[ShardEntry, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        [entry] = self._rows(number, number + 1)
        return entry

    def __iter__(self) -> Iterator[ShardEntry]:
        for begin in range(0, len(self), _AT_ONCE):
            yield from self._rows(begin, min(begin + _AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return len(self) == len(other) and (self.npz.view == other.npz.view or all(map(ShardEntry.__eq__, self, other)))

    def __repr__(self) -> str:
        return f"<ShardTable of {len(self)} shards>"

    @property
    def num_samples(self) -> Indices:
        """(num_shards,) samples of each shard."""
        return self._columns["num_samples"].astype(np.int64)

    @property
    def num_bytes(self) -> Indices:
        """(num_shards,) size of each tar."""
        return self._columns["num_bytes"].astype(np.int64)

    def name(self, shard: int) -> str:
        """Return the file name of a tar."""
        return _text(self._names[shard])

    def stem(self, shard: int) -> str:
        """Return the file name of a tar without `.tar`."""
        return self.name(shard).removesuffix(".tar")

    def digests_json(self, suffix: str) -> Iterator[str]:
        """Give the digest of each shard's file with a suffix as JSON has it, in hex or null."""
        column = self._columns.get(f"digests/{suffix}")
        if column is None:
            return repeat("null", len(self))
        return ("null" if digest is None else f'"{digest}"' for digest in _hex_of(column))

    def _rows(self, begin: int, end: int) -> Iterator[ShardEntry]:
        names = map(_text, self._names[begin:end])
        numbers = [self._columns[name][begin:end].tolist() for name in _NUMBERS]
        tallies: list[Iterator[dict[str, Any]]] = [
            _mappings({key: _counts_of(column[begin:end]) for key, column in self._keyed(tally).items()}, end - begin)
            for tally in _TALLIES
        ]
        digests = _mappings(
            {key: _hex_of(column[begin:end]) for key, column in self._keyed("digests").items()}, end - begin
        )
        for name, row, of_files, (outcomes, rejections, jpegs) in zip(
            names, zip(*numbers, strict=True), digests, zip(*tallies, strict=True), strict=True
        ):
            values: dict[str, int] = dict(zip(_NUMBERS, row, strict=True))
            yield ShardEntry(
                name=name, **values, digests=of_files, outcomes=outcomes, rejections=rejections, jpegs=jpegs
            )

    def _keyed(self, mapping: str) -> Columns:
        begin = f"{mapping}/"
        return {name.removeprefix(begin): column for name, column in self._columns.items() if name.startswith(begin)}


def _mappings(columns: Mapping[str, Iterable[Any]], count: int) -> Iterator[dict[str, Any]]:
    """Give row after row of some columns as a mapping, without what is None."""
    rows = zip(*columns.values(), strict=True) if columns else repeat((), count)
    for row in rows:
        yield {key: value for key, value in zip(columns, row, strict=True) if value is not None}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _counts_of(column: NDArray[Any]) -> list[int | None]:
    return [None if count == _NO_COUNT else count for count in column.tolist()]


def _hex_of(column: NDArray[Any]) -> Iterator[str | None]:
    none = _NO_DIGEST.hex()
    for begin in range(0, len(column), _AT_ONCE):
        text = column[begin : begin + _AT_ONCE].tobytes().hex()
        for at in range(0, len(text), 2 * _DIGEST_BYTES):
            digest = text[at : at + 2 * _DIGEST_BYTES]
            yield None if digest == none else digest


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    for row in rows:
        if not row["name"] or "/" in row["name"]:
            raise ValueError(f"the shard {row['name']!r} has no name of a file in its folder")
    columns: Columns = {"name": np.array([row["name"].encode("utf-8", "surrogateescape") for row in rows], dtype="S")}
    for name, dtype in _NUMBERS.items():
        columns[name] = np.array([row[name] for row in rows], dtype=dtype)
    for suffix in dict.fromkeys(suffix for row in rows for suffix in row["digests"]):
        columns[f"digests/{suffix}"] = _digest_column([row["digests"].get(suffix) for row in rows])
    for tally in _TALLIES:
        # Earlier versions did not note the kinds.
        counts = [row.get(tally, {}) if tally == "jpegs" else row[tally] for row in rows]
        for key in sorted({key for each in counts for key in each}):
            columns[f"{tally}/{key}"] = np.array([each.get(key, _NO_COUNT) for each in counts], dtype=_COUNT)
    return columns


def _digest_column(digests: Sequence[str | None]) -> NDArray[np.uint8]:
    raw = [_NO_DIGEST if digest is None else bytes.fromhex(digest) for digest in digests]
    if wrong := next((digest for digest, each in zip(digests, raw, strict=True) if len(each) != _DIGEST_BYTES), None):
        raise ValueError(f"{wrong!r} is not a digest of xxh3_128")
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(len(raw), _DIGEST_BYTES)


def _concatenated(parts: Sequence[Columns]) -> Columns:
    """Put tables one behind the other; what a table has no column for, its rows lack."""
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: np.concatenate([_filled(part, name) for part in parts]) for name in names}
    # Tallies are sorted, as they are in every shard; digests keep their order, the tar's first.
    keyed = sorted(name for name in columns if name.partition("/")[0] in _TALLIES)
    return {name: columns[name] for name in (*(name for name in columns if name not in keyed), *keyed)}


def _filled(part: Columns, name: str) -> NDArray[Any]:
    if name in part:
        return part[name]
    count = len(part["name"])
    if name.startswith("digests/"):
        return np.zeros((count, _DIGEST_BYTES), dtype=np.uint8)
    return np.full(count, _NO_COUNT, dtype=_COUNT)


def _to_npz(columns: Columns) -> bytes:
    """Return an uncompressed .npz, always the same for the same columns."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                npy.write_array(member, column, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _open_columns(view: memoryview) -> Columns:
    """Map the members of an uncompressed .npz."""
    columns: Columns = {}
    # A mapping reads and seeks, and ZipFile asks for no more.
    content = cast("IO[bytes]", view.obj) if isinstance(view.obj, mmap.mmap) else io.BytesIO(view)
    with zipfile.ZipFile(content) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
        begin = member.header_offset + _LOCAL_HEADER_BYTES
        begin += sum(struct.unpack_from("<HH", view, begin - 4))
        head = io.BytesIO(view[begin : begin + min(member.file_size, 1 << 16)])
        npy.read_magic(head)
        shape, _, dtype = npy.read_array_header_1_0(head)
        count = int(np.prod(shape))
        column = np.frombuffer(view, dtype=dtype, count=count, offset=begin + head.tell()).reshape(shape)
        columns[member.filename.removesuffix(".npy")] = column
    return columns
