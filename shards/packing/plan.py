"""Plan of a packing: one table on disk that says which input goes to which position of which shard.

    .pack/plan/plan.json    settings, sources, splits, class names; written last
    .pack/plan/rows.bin     one ROW for each listed input, in the order of the listing
    .pack/plan/names.bin    the names that the rows point into
    .pack/plan/order.bin    the row at each planned position, split after split (<u8)
    .pack/plan/dropped.bin  inputs that have no position since an earlier one has the same content (DROPPED)
    .pack/plan/left-aside.jsonl  what of the sources is not an input
    .pack/plan/label-sets.npy    where inputs have sets of classes: every different one; a row's label is its number

Any process that has the plan can write any of its shards, in any order, with the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from shards.ground.arrays import LabelSets
from shards.ground.errors import PackError
from shards.sources import Source, reopen_source

__all__ = [
    "DROPPED",
    "LABEL_SETS_NAME",
    "ROW",
    "Duplicates",
    "Header",
    "PackPlan",
    "ShardTask",
    "Split",
    "TableWriter",
    "cached_plan",
    "difference",
    "shuffled",
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
DROPPED = np.dtype([("row", "<u8"), ("first", "<u8"), ("split", "<u4")])
"""A row, the earlier row of the same content, and the split that both belong to."""

PLAN_VERSION = 1
LABEL_SETS_NAME = "label-sets.npy"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of the inputs that becomes a set of its own."""

    name: str
    """Folder below the target; empty: the target itself."""
    first: int
    """Where the split begins in order.bin."""
    num_positions: int
    shard_samples: int
    """Planned positions a shard."""

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


class PackPlan:
    """A plan that was written earlier, memory-mapped.

    Args:
        folder: where its files are.
        header: content of plan.json.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = header["settings"]
        self.source_specs: list[dict[str, Any]] = header["sources"]
        self.class_names: tuple[str, ...] = tuple(header["class_names"])
        self.depth_range: str = header["depth_range"]
        self.splits = [Split(**split) for split in header["splits"]]
        self._rows = np.memmap(folder / "rows.bin", dtype=ROW, mode="r")
        self._names = memoryview(cast("Any", np.memmap(folder / "names.bin", dtype=np.uint8, mode="r")))
        # Nothing can be mapped where every input is a duplicate or none was listed; that is refused before.
        self._order = np.memmap(folder / "order.bin", dtype="<u8", mode="r")
        self._sources: dict[int, Source] = {}
        has_sets = (folder / LABEL_SETS_NAME).exists()
        self.label_sets: LabelSets | None = np.load(folder / LABEL_SETS_NAME) if has_sets else None
        """(S, C), each different set, where labels are sets: then a row's label is the number of one."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a plan.

        Raises:
            PackError: of another version, or damaged.
        """
        path = folder / "plan.json"
        try:
            header = json.loads(path.read_bytes())
            if header["version"] != PLAN_VERSION:
                raise PackError(f"{path} was written by another version: remove {folder.parent} and pack again")
            return cls(folder, header)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, PackError):
                raise
            raise PackError(f"{path} is damaged ({error}): remove {folder.parent} and pack again") from error

    @property
    def num_inputs(self) -> int:
        """Rows of the table."""
        return len(self._rows)

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

    def listed(self, start: int, stop: int) -> NDArray[np.void]:
        """Return the rows in the order of the listing."""
        return self._rows[start:stop]

    def duplicates(self, split: int) -> Iterator[tuple[str, str]]:
        """Return (source, source of the earlier input with the same content) of each input left out of a split."""
        dropped = np.fromfile(self.folder / "dropped.bin", dtype=DROPPED)
        dropped = dropped[dropped["split"] == split]
        for start in range(0, len(dropped), 4096):
            chunk = dropped[start : start + 4096]
            pairs = (self.inputs(self._rows[chunk[column]]) for column in ("row", "first"))
            for (source, name, *_), (first_source, first_name, *_) in zip(*pairs, strict=True):
                yield source.describe(name), first_source.describe(first_name)

    def num_duplicates(self, split: int) -> int:
        """Return how many inputs were left out of a split."""
        return int((np.fromfile(self.folder / "dropped.bin", dtype=DROPPED)["split"] == split).sum())

    def rows(self, task: ShardTask) -> NDArray[np.void]:
        """Return the rows of a shard, (len(positions(task)),) of ROW."""
        positions, first = self.positions(task), self.splits[task.split].first
        return self._rows[self._order[first + positions.start : first + positions.stop]]

    def inputs(self, rows: NDArray[np.void]) -> Iterator[tuple[Source, bytes, int, int, int]]:
        """Return (source, name, offset, size, label) of each row."""
        columns = (rows[name].tolist() for name in ("source", "name_at", "name_size", "offset", "size", "label"))
        for source, name_at, name_size, offset, size, label in zip(*columns, strict=True):
            yield self.source(source), self._names[name_at : name_at + name_size].tobytes(), offset, size, label

    def source(self, number: int) -> Source:
        """Return one of the plan's sources, opened once per process."""
        if number not in self._sources:
            self._sources[number] = reopen_source(self.source_specs[number], self.folder)
        return self._sources[number]


def cached_plan(folder: Path) -> PackPlan:
    """Open a plan, or take the one opened before if it is still the same; a worker asks for it with every task."""
    status = (folder / "plan.json").stat()
    return _open_cached(folder, (status.st_dev, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _open_cached(folder: Path, identity: tuple[int, ...]) -> PackPlan:
    # A later packing in the same process may have put another plan in the same place.
    del identity
    return PackPlan.open(folder)


class TableWriter:
    """Writes rows.bin and names.bin while the sources are being listed, in bounded memory.

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

    def _flush(self) -> None:
        self._rows.write(np.array(self._pending, dtype=ROW).tobytes())
        self._names.write(b"".join(self._pending_names))
        self.num_rows += len(self._pending)
        self._pending.clear()
        self._pending_names.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._rows, self._names:
            if kind is None:
                self._flush()


@dataclass(frozen=True)
class Duplicates:
    """The inputs that get no position."""

    dropped: NDArray[np.void]
    """(N,) of DROPPED."""

    @classmethod
    def none(cls) -> Self:
        """Keep everything."""
        return cls(np.empty(0, dtype=DROPPED))

    @classmethod
    def of(cls, firsts: NDArray[np.int64], split: NDArray[np.int64]) -> Self:
        """Return every row but the first of its content.

        Args:
            firsts: (num_rows,) first row of the same content.
            split: (num_rows,) split of each row.
        """
        rows = np.flatnonzero(firsts != np.arange(len(firsts)))
        dropped = np.empty(len(rows), dtype=DROPPED)
        dropped["row"], dropped["first"], dropped["split"] = rows, firsts[rows], split[rows]
        return cls(dropped)

    def write(self, folder: Path) -> None:
        """Write dropped.bin."""
        self.dropped.tofile(folder / "dropped.bin")


def shuffled(num_rows: int, seed: int) -> NDArray[np.uint64]:
    """Return a permutation of range(num_rows) that no library's release can change.

    Rows are sorted by splitmix64 of their number (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"), with the seed hashed into where the counter starts.

    Returns:
        (num_rows,) uint64.
    """
    start = _splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    keys = np.arange(num_rows, dtype=np.uint64)
    keys += start
    return np.argsort(_splitmix64(keys), kind="stable").view(np.uint64)


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


@dataclass(frozen=True, kw_only=True)
class Header:
    """Content of plan.json."""

    settings: dict[str, Any]
    sources: list[Source]
    class_names: tuple[str, ...]
    splits: list[Split]
    depth_range: str = "full"
    """As EncodeConfig's, without `auto`."""

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        values = {
            "version": PLAN_VERSION,
            "settings": self.settings,
            "sources": [source.spec() for source in self.sources],
            "class_names": self.class_names,
            "depth_range": self.depth_range,
            "splits": [asdict(split) for split in self.splits],
        }
        (folder / "plan.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def difference(old: dict[str, Any], new: dict[str, Any], *, render: Callable[[Any], str] | None = None) -> str:
    """Return the settings in which two packings differ, as text; empty when they agree."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    render = render or (lambda value: "unset" if value is None else str(value))
    return ", ".join(f"--{n.replace('_', '-')} was {render(old.get(n))}, is {render(new.get(n))}" for n in names)
