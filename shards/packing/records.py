"""Records of finished shards, in `.pack/done`: one for each shard as it is written, and one for each group of them.

A group saves requests: what continues, finishes or watches a packing reads one record for a few hundred shards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from shards.ground.threads import mapped
from shards.packing.plan import ShardTask, Split
from shards.sets.manifest import ShardEntry
from shards.storage.target import WORK_NAME, Target, path_in

__all__ = ["Finished", "RecordGroups", "put_record", "read_notes", "read_records"]

GROUP_SHARDS = 256
_FOLDER = f"{WORK_NAME}/done"
_THREADS = 32
_AHEAD = 256
Notes = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is known of a finished shard."""

    entry: ShardEntry
    span: tuple[float, float] | None
    """When its writing began and ended, in seconds since 1970; None: an earlier version wrote it."""
    part: str
    """What wrote it, as in `Target`."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return what was written as JSON."""
        return cls(
            entry=ShardEntry.from_dict(values["entry"]),
            span=tuple(values["span_s"]) if "span_s" in values else None,
            part=values.get("part", ""),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return {"entry": asdict(self.entry), "span_s": self.span, "part": self.part}

    def is_whole(self, split: str, sizes: Mapping[str, int]) -> bool:
        """Return whether the shard's files are there.

        Args:
            split: its folder.
            sizes: of the target's files.
        """
        names = [path_in(split, f"{self.entry.stem}{suffix}") for suffix in self.entry.digests]
        return sizes.get(names[0]) == self.entry.num_bytes and all(name in sizes for name in names)


def _name(task: ShardTask) -> str:
    return f"{task.split}-{task.shard:06d}"


def put_record(target: Target, task: ShardTask, finished: Finished, notes: Notes) -> None:
    """Write the record which says that a shard is finished.

    Args:
        target: where to.
        task: the shard.
        finished: what is known of it.
        notes: what else: inputs that were rejected, and samples of nearly one color.
    """
    data = json.dumps(finished.as_dict() | notes, ensure_ascii=False).encode()
    target.put(f"{_FOLDER}/{_name(task)}.json", data)


class RecordGroups:
    """Writes the records of shards once more, a few hundred in one file.

    Args:
        target: where to.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._waiting: dict[str, dict[str, Any]] = {}

    def add(self, task: ShardTask, finished: Finished) -> None:
        """Note a shard that has been finished."""
        self._waiting[_name(task)] = finished.as_dict()
        if len(self._waiting) == GROUP_SHARDS:
            self.flush()

    def flush(self) -> None:
        """Write what was not written yet; a single record is there already."""
        if len(self._waiting) > 1:
            data = json.dumps(self._waiting, ensure_ascii=False).encode()
            self._target.put(f"{_FOLDER}/group-{next(iter(self._waiting))}.json", data)
        self._waiting.clear()


def read_records(
    target: Target, splits: Sequence[Split], tasks: Sequence[ShardTask], sizes: Mapping[str, int]
) -> dict[ShardTask, Finished]:
    """Return what is known of the shards that are finished, those whose files are all there.

    Args:
        target: where they are.
        splits: of the plan.
        tasks: the shards that are looked for.
        sizes: of the target's files.
    """
    wanted = {_name(task): task for task in tasks}
    found: dict[str, Finished] = {}
    groups = [name for name in sizes if name.startswith(f"{_FOLDER}/group-")]
    for values in _read_json(target, groups):
        found |= {name: Finished.of(record) for name, record in (values or {}).items() if name in wanted}
    single = [name for name in wanted if name not in found and f"{_FOLDER}/{name}.json" in sizes]
    records = _read_json(target, [f"{_FOLDER}/{name}.json" for name in single])
    # One may have gone since the files were listed, when another process finished the packing.
    found |= {name: Finished.of(record) for name, record in zip(single, records, strict=True) if record is not None}
    return {
        task: found[name]
        for name, task in wanted.items()
        if name in found and found[name].is_whole(splits[task.split].name, sizes)
    }


def read_notes(target: Target, tasks: Sequence[ShardTask], what: str) -> Iterator[dict[str, Any]]:
    """Return what was noted of shards that are finished, in their order.

    Args:
        target: where they are.
        tasks: the shards.
        what: a key of the notes.
    """
    for values in _read_json(target, [f"{_FOLDER}/{_name(task)}.json" for task in tasks]):
        yield from (values or {})[what]


def _read_json(target: Target, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """Return the content of each file; None for one that is not there."""
    for _, data in mapped(target.get, names, threads=_THREADS, ahead=_AHEAD):
        yield None if data is None else json.loads(data)
