"""Plan of a packing: tables in the target that say which input goes to which position of which shard.

    .pack/plan.json                   the name of the plan that everyone follows: `plan-ID`
    .pack/plan-ID/plan.json           settings, sources, splits, class names
    .pack/plan-ID/rows.bin            one ROW for each planned position, split after split
    .pack/plan-ID/names.bin           the names that the rows point into, in the same order
    .pack/plan-ID/duplicates-0.jsonl  of each split, what has no position since an earlier input has the same content

    .pack/listed.json                 the name of the listing that the plan is made of: `listed-ID`
    .pack/listed-ID/                  the same tables, in the order of the listing, and beside them
      left-aside.jsonl                what of the sources is not an input
      label-sets.npy                  where inputs have sets of classes: every different one, which labels number
      spool-3                         what of source 3 cannot be read where it is

Any process that reaches the target can write any of the plan's shards, in any order, with the same bytes. It reads the
rows that it needs alone: those of a shard lie next to each other, and so do their names.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shards.ground.arrays import LabelSets
from shards.ground.errors import PackError
from shards.ground.locks import locked
from shards.sources import Source, reopen_source
from shards.storage.file_kinds import ASIDE_NAME
from shards.storage.stores import is_url, open_bytes, open_folder
from shards.storage.target import PLAN_NAME, Target

__all__ = [
    "HEADER_NAME",
    "LABEL_SETS_NAME",
    "ROW",
    "Header",
    "PackPlan",
    "PlanRows",
    "ShardTask",
    "Split",
    "TableWriter",
    "cached_plan",
    "difference",
    "duplicates_name",
    "open_plan",
    "tasks_of",
]

ROW = np.dtype(
    [
        ("source", "<u4"),
        ("label", "<i4"),
        ("name_at", "<u8"),  # offset in names.bin
        ("name_size", "<u4"),
        ("offset", "<i8"),
        ("size", "<i8"),
    ]
)

PLAN_VERSION = 2
_PIECE_BYTES = 16 << 20
HEADER_NAME = "plan.json"
LABEL_SETS_NAME = "label-sets.npy"


def duplicates_name(split: int) -> str:
    """Return the name of the file of a split's duplicates."""
    return f"duplicates-{split}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of the inputs that becomes a set of its own."""

    name: str
    """Folder below the target; empty: the target itself."""
    first: int
    """Where the split begins in rows.bin."""
    num_positions: int
    shard_samples: int
    """Planned positions per shard."""
    num_duplicates: int = 0
    """Inputs that have no position."""

    @property
    def num_shards(self) -> int:
        """Shards that the split is cut into."""
        return -(-self.num_positions // self.shard_samples)

    def positions(self, shard: int) -> range:
        """Return the planned positions of a shard within the split."""
        first = shard * self.shard_samples
        return range(first, min(first + self.shard_samples, self.num_positions))


@dataclass(frozen=True, kw_only=True, order=True)
class ShardTask:
    """One shard of the plan: the unit of work."""

    split: int
    shard: int


def tasks_of(splits: Sequence[Split]) -> list[ShardTask]:
    """Return every shard of some splits, in order."""
    return [ShardTask(split=s, shard=i) for s, split in enumerate(splits) for i in range(split.num_shards)]


class PlanRows(NamedTuple):
    """Some rows of a plan, with their names."""

    table: NDArray[np.void]
    """(N,) of ROW, whose names lie one after the other."""
    names: bytes


class PackPlan:
    """A plan that was written earlier, or the listing that one is made of. Tables are read when they are needed.

    Args:
        place: folder or address of its files.
        header: content of plan.json.
        spools: local folder for copies of spools, where these are in a bucket.
    """

    def __init__(self, place: str, header: dict[str, Any], spools: Path | None) -> None:
        self.place = place
        self.settings: dict[str, Any] = header["settings"]
        self.source_specs: list[dict[str, Any]] = header["sources"]
        self.class_names: tuple[str, ...] = tuple(header["class_names"])
        self.depth_range: str = header["depth_range"]
        self.splits = [Split(**split) for split in header["splits"]]
        self.has_label_sets: bool = header["has_label_sets"]
        self._listed = f"{place.rpartition('/')[0]}/{header['listed']}" if header["listed"] else place
        self._spools = spools
        self._sources: dict[int, Source] = {}
        self.label_sets: LabelSets | None = None
        """(S, C), each different set, where labels are sets: then a row's label is the number of one."""
        if self.has_label_sets:
            self.label_sets = np.load(io.BytesIO(_read_whole(f"{self._listed}/{LABEL_SETS_NAME}")))

    @classmethod
    def open(cls, place: str, spools: Path | None = None) -> Self:
        """Open a plan.

        Raises:
            FileNotFoundError: there is none.
            PackError: of another version, or damaged.
        """
        path, out = f"{place}/{HEADER_NAME}", _target_of(place)
        try:
            header = json.loads(_read_whole(path))
            if header["version"] != PLAN_VERSION:
                raise PackError(
                    f"{path} was written by another version of make-shards: finish the packing with that version, or "
                    f"remove {out} to start over"
                )
            return cls(place, header, spools)
        except (ValueError, KeyError, TypeError) as error:
            raise PackError(f"{path} is damaged ({error}): remove {out} to start over") from error

    @property
    def name(self) -> str:
        """Name of the plan's folder."""
        return self.place.rpartition("/")[2]

    @property
    def num_positions(self) -> int:
        """PlanRows of the table."""
        return sum(split.num_positions for split in self.splits)

    @property
    def num_inputs(self) -> int:
        """Inputs that were listed."""
        return self.num_positions + sum(split.num_duplicates for split in self.splits)

    @property
    def is_remote(self) -> bool:
        """Whether reading any of the sources waits for a network."""
        return any(self.source(number).is_remote for number in range(len(self.source_specs)))

    def tasks(self) -> list[ShardTask]:
        """Return every shard of the plan, in order."""
        return tasks_of(self.splits)

    def positions(self, task: ShardTask) -> range:
        """Return the planned positions of a shard within its split."""
        return self.splits[task.split].positions(task.shard)

    def shard(self, task: ShardTask) -> PlanRows:
        """Return the rows of a shard, as many as positions(task)."""
        positions, first = self.positions(task), self.splits[task.split].first
        return self.rows(first + positions.start, first + positions.stop)

    def rows(self, start: int, stop: int) -> PlanRows:
        """Return rows that lie next to each other."""
        data = open_bytes(f"{self.place}/rows.bin").read(start * ROW.itemsize, (stop - start) * ROW.itemsize)
        table = np.frombuffer(data, dtype=ROW)
        if len(table) != stop - start:
            raise PackError(f"{self.place}/rows.bin is cut: remove {_target_of(self.place)} to start over")
        if not len(table):
            return PlanRows(table, b"")
        begin, end = int(table["name_at"][0]), int(table["name_at"][-1] + table["name_size"][-1])
        return PlanRows(table, open_bytes(f"{self.place}/names.bin").read(begin, end - begin) if end > begin else b"")

    def rows_at(self, positions: NDArray[np.int64]) -> PlanRows:
        """Return a few rows that lie anywhere."""
        single = [self.rows(position, position + 1) for position in positions.tolist()]
        return PlanRows(np.concatenate([rows.table for rows in single]), b"".join(rows.names for rows in single))

    def inputs(self, rows: PlanRows) -> Iterator[tuple[Source, bytes, int, int, int]]:
        """Return (source, name, offset, size, label) of each row."""
        columns = (rows.table[name].tolist() for name in ("source", "name_size", "offset", "size", "label"))
        at = 0
        for source, name_size, offset, size, label in zip(*columns, strict=True):
            yield self.source(source), rows.names[at : at + name_size], offset, size, label
            at += name_size

    def source(self, number: int) -> Source:
        """Return one of the plan's sources, opened once per process."""
        if number not in self._sources:
            spec = self.source_specs[number]
            folder = self._with_spool(spec["spool"]) if "spool" in spec else Path(self._listed)
            self._sources[number] = reopen_source(spec, folder)
        return self._sources[number]

    def _with_spool(self, name: str) -> Path:
        """Return a local folder that holds a spool; out of a bucket it is copied once per machine."""
        if not is_url(self._listed):
            return Path(self._listed)
        assert self._spools is not None
        folder = self._spools / self._listed.rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"lock-{name}", holder=name, wait=True):
            if not (folder / name).exists():
                open_folder(self._listed).download(name, folder / f"{name}.partial")
                (folder / f"{name}.partial").rename(folder / name)
        return folder

    def left_aside(self) -> bytes:
        """Return the content of left-aside.jsonl; empty where nothing is left aside."""
        return _read_if_there(f"{self._listed}/{ASIDE_NAME}")

    def duplicates(self, split: int) -> Iterator[bytes]:
        """Return the lines of rejected.jsonl for what has no position in a split, in pieces."""
        if self.splits[split].num_duplicates:
            file = open_bytes(f"{self.place}/{duplicates_name(split)}")
            for start in range(0, file.size, _PIECE_BYTES):
                yield file.read(start, _PIECE_BYTES)


def _target_of(place: str) -> str:
    """Return the target that a plan is in: without its plan, the shards there are of no use."""
    return place.rpartition("/")[0].rpartition("/")[0]


def _read_whole(path: str) -> bytes:
    file = open_bytes(path)
    return file.read(0, file.size)


def _read_if_there(path: str) -> bytes:
    try:
        return _read_whole(path)
    except FileNotFoundError:
        return b""


def open_plan(target: Target, pointer: str = PLAN_NAME) -> PackPlan:
    """Open the plan that everyone follows.

    Args:
        target: of the packing, which was begun.
        pointer: file that names the plan, or the listing.

    Raises:
        FileNotFoundError: the packing was finished, or removed, meanwhile.
        PackError: of another version, or damaged.
    """
    name = target.get(pointer)
    if name is None:
        raise FileNotFoundError(2, "no packing is going on there any more", target.address(pointer))
    return PackPlan.open(target.address(name.decode()), target.work / "spools")


@lru_cache(maxsize=1)
def cached_plan(place: str, spools: Path | None = None) -> PackPlan:
    """Open a plan, or take the one opened before; a worker asks for it with every task. No two plans have one name."""
    return PackPlan.open(place, spools)


class TableWriter:
    """Writes rows.bin and names.bin, in bounded memory.

    Args:
        folder: where to.
    """

    _CHUNK = 1 << 16

    def __init__(self, folder: Path) -> None:
        self._rows = (folder / "rows.bin").open("wb")
        self._names = (folder / "names.bin").open("wb")
        self._pending: list[tuple[int, int, int, int, int, int]] = []
        self._pending_names: list[bytes] = []
        self._names_bytes = 0
        self.num_rows = 0

    def add(self, source: int, label: int, name: bytes, offset: int, size: int) -> None:
        """Append a row."""
        self._pending.append((source, label, self._names_bytes, len(name), offset, size))
        self._pending_names.append(name)
        self._names_bytes += len(name)
        if len(self._pending) >= self._CHUNK:
            self._flush()

    def extend(self, table: NDArray[np.void], names: bytes) -> None:
        """Append rows whose names lie one after the other; where they lie in the whole is set."""
        self._flush()
        table = table.copy()
        table["name_at"] = self._names_bytes + np.cumsum(table["name_size"], dtype=np.uint64) - table["name_size"]
        self._write(table, names)
        self._names_bytes += len(names)

    def _flush(self) -> None:
        self._write(np.array(self._pending, dtype=ROW), b"".join(self._pending_names))
        self._pending.clear()
        self._pending_names.clear()

    def _write(self, table: NDArray[np.void], names: bytes) -> None:
        self._rows.write(table.tobytes())
        self._names.write(names)
        self.num_rows += len(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._rows, self._names:
            if kind is None:
                self._flush()


@dataclass(frozen=True, kw_only=True)
class Header:
    """Content of plan.json."""

    settings: dict[str, Any]
    sources: Sequence[dict[str, Any]]
    """What each source is opened by."""
    class_names: tuple[str, ...]
    splits: list[Split]
    depth_range: str
    """As EncodeConfig's, without `auto`."""
    has_label_sets: bool
    listed: str | None = None
    """Name of the folder of the listing; None: this is the listing."""

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        values = {"version": PLAN_VERSION} | asdict(self)
        (folder / HEADER_NAME).write_text(json.dumps(values, indent=1), encoding="utf-8")


def difference(old: dict[str, Any], new: dict[str, Any], *, render: Callable[[Any], str] | None = None) -> str:
    """Return the settings in which two packings differ, as text; empty when they agree."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    render = render or (lambda value: "unset" if value is None else str(value))
    return ", ".join(f"--{n.replace('_', '-')} was {render(old.get(n))}, is {render(new.get(n))}" for n in names)
