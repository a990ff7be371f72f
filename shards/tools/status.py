"""Command `status`: how far a packing is, from the files that it leaves, whoever packs and wherever."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shards.config import WORK_FOLDER
from shards.ground.units import counted, format_bytes, format_duration
from shards.packing.finish import read_manifest, refuse_earlier_version
from shards.packing.plan import ShardTask, Split, open_plan, tasks_of
from shards.packing.records import Finished, read_records
from shards.sets.manifest import MANIFEST_NAME
from shards.storage.target import PLAN_NAME, WORK_NAME, Target, open_target

__all__ = ["PackStatus", "PartStatus", "describe_status", "read_status"]


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """How far a part of an array job is."""

    part: str
    """As it was given to --part."""
    num_shards: int
    num_shards_done: int


@dataclass(frozen=True, kw_only=True)
class PackStatus:
    """How far a packing is."""

    state: Literal["listing", "packing", "to be finished", "finished"]
    """`to be finished`: every shard is written, the manifest is not."""
    is_held: bool
    """A packer on this machine is at work; one elsewhere may be."""
    num_inputs: int
    """Planned, without the duplicates."""
    num_done: int
    """Packed or rejected."""
    num_packed: int
    num_rejected: int
    num_duplicates: int
    """Left out by --dedup."""
    rejections: dict[str, int]
    """Rejected inputs by reason."""
    num_shards: int
    num_shards_done: int
    num_bytes: int
    """Of the finished shards."""
    num_writing: int
    """Shards that are being written; in a bucket, they cannot be seen."""
    writing_bytes: int
    inputs_per_s: float | None
    """While at least one shard was being written; None: not known yet."""
    bytes_per_s: float | None
    inputs_per_worker_s: float | None
    """Inputs per second of one worker, which is one CPU."""
    time_left_s: float | None
    last_done_s: float | None
    """Seconds since 1970 when the newest shard was finished."""
    parts: tuple[PartStatus, ...]
    """The parts of an array job, once one of them has finished a shard."""

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(asdict(self), indent=1)


def read_status(out: str, *, work_folder: str = WORK_FOLDER) -> PackStatus:
    """Look how far a packing is. Nothing is changed, and no packer waits.

    Args:
        out: what was given to `pack` as --out.
        work_folder: local folder of the packing, where it goes to a bucket.

    Raises:
        ValueError: nothing is packed there.
        PackError: the plan is damaged, or the bucket does not answer.
    """
    target = open_target(out, work_folder=work_folder)
    sizes = target.sizes()
    if PLAN_NAME not in sizes:
        refuse_earlier_version(target)
        return _without_plan(target, sizes)
    try:
        splits = open_plan(target).splits
    except FileNotFoundError:
        # Finished between two looks.
        return _without_plan(target, target.sizes())
    tasks = tasks_of(splits)
    records = read_records(target, splits, tasks, sizes)
    return _status(target, splits, records, sizes)


def _status(
    target: Target,
    splits: Sequence[Split],
    records: dict[ShardTask, Finished],
    sizes: dict[str, int],
) -> PackStatus:
    tasks = tasks_of(splits)
    num_inputs = sum(split.num_positions for split in splits)
    entries = [record.entry for record in records.values()]
    writing = [size for name, size in sizes.items() if name.startswith(f"{WORK_NAME}/scratch") and ".tar." in name]
    num_done = sum(len(splits[task.split].positions(task.shard)) for task in records)
    timed = {task: record for task, record in records.items() if record.span is not None}
    seconds = _covered_s([record.span for record in timed.values() if record.span is not None])
    num_timed = sum(len(splits[task.split].positions(task.shard)) for task in timed)
    rate = num_timed / seconds if seconds else None
    worker_s = sum(record.span[1] - record.span[0] for record in timed.values() if record.span is not None)
    return PackStatus(
        state="packing" if len(records) < len(tasks) else "to be finished",
        is_held=target.is_held(),
        num_inputs=num_inputs,
        num_done=num_done,
        num_packed=sum(entry.num_samples for entry in entries),
        num_rejected=sum(entry.num_rejected for entry in entries),
        num_duplicates=sum(split.num_duplicates for split in splits),
        rejections=dict(sum((Counter(entry.rejections) for entry in entries), Counter[str]())),
        num_shards=len(tasks),
        num_shards_done=len(records),
        num_bytes=sum(entry.num_bytes for entry in entries),
        num_writing=len(writing),
        writing_bytes=sum(writing),
        inputs_per_s=rate,
        bytes_per_s=sum(record.entry.num_bytes for record in timed.values()) / seconds if seconds else None,
        inputs_per_worker_s=num_timed / worker_s if worker_s else None,
        time_left_s=(num_inputs - num_done) / rate if rate else None,
        last_done_s=max((record.span[1] for record in timed.values() if record.span is not None), default=None),
        parts=_parts(tasks, records),
    )


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds that lie in at least one span: those of a night between two runs do not count."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _parts(tasks: Sequence[ShardTask], records: dict[ShardTask, Finished]) -> tuple[PartStatus, ...]:
    counts = {int(record.part.rpartition("-")[2]) for record in records.values() if record.part}
    # Parts of different counts share out the shards in different ways: there is no telling whose is whose.
    if len(counts) != 1:
        return ()
    [count] = counts
    shares = [tasks[number::count] for number in range(count)]
    return tuple(
        PartStatus(
            part=f"{number}/{count}",
            num_shards=len(share),
            num_shards_done=sum(task in records for task in share),
        )
        for number, share in enumerate(shares)
    )


def _without_plan(target: Target, sizes: dict[str, int]) -> PackStatus:
    names = [name.rpartition("/")[0] for name in sizes if name.rpartition("/")[2] == MANIFEST_NAME]
    if not names and not target.work.exists():
        raise ValueError(f"nothing is packed at {target.out}: give what was given to `make-shards pack` as --out")
    manifests = [read_manifest(target, name) for name in names]
    num_shards = sum(len(manifest.shards) for manifest in manifests)
    rejections = sum((Counter(manifest.rejections) for manifest in manifests), Counter[str]())
    num_duplicates = rejections.pop("duplicate", 0)
    num_inputs = sum(manifest.num_inputs for manifest in manifests) - num_duplicates
    values: dict[str, Any] = dict.fromkeys(
        ("inputs_per_s", "bytes_per_s", "inputs_per_worker_s", "time_left_s", "last_done_s")
    )
    return PackStatus(
        state="finished" if names else "listing",
        is_held=target.is_held(),
        num_inputs=num_inputs,
        num_done=num_inputs,
        num_packed=sum(manifest.num_samples for manifest in manifests),
        num_rejected=sum(manifest.num_rejected for manifest in manifests) - num_duplicates,
        num_duplicates=num_duplicates,
        rejections=dict(rejections),
        num_shards=num_shards,
        num_shards_done=num_shards,
        num_bytes=sum(int(manifest.shards.num_bytes.sum()) for manifest in manifests),
        num_writing=0,
        writing_bytes=0,
        parts=(),
        **values,
    )


def describe_status(status: PackStatus, out: str, *, now_s: float | None = None) -> Iterator[str]:
    """Return how far a packing is as lines of text.

    Args:
        status: of `read_status`.
        out: what to call it.
        now_s: seconds since 1970; None: the present.
    """
    if status.state == "finished":
        yield f"{out}: finished"
    else:
        yield f"{out}: {status.state}; {'a' if status.is_held else 'no'} packer of this machine is at work"
    if status.state == "listing":
        return
    tally = ", ".join(f"{reason} {count:,}" for reason, count in sorted(status.rejections.items()))
    done = f"{status.num_done:,} of {counted(status.num_inputs, 'input')} done"
    share = f"{status.num_done / max(1, status.num_inputs):.0%}"
    packed = f"{status.num_packed:,} packed, {format_bytes(status.num_bytes)}"
    yield f"  {done} ({share}): {packed}; {status.num_rejected:,} rejected{f' ({tally})' if tally else ''}"
    if status.num_duplicates:
        yield f"  {counted(status.num_duplicates, 'duplicate')} left out"
    writing = f"; {status.num_writing} being written, {format_bytes(status.writing_bytes)} so far"
    shards = f"{status.num_shards_done:,} of {counted(status.num_shards, 'shard')} done"
    yield f"  {shards}{writing if status.num_writing else ''}"
    for part in status.parts:
        yield f"  part {part.part}: {part.num_shards_done:,} of {counted(part.num_shards, 'shard')} done"
    if status.state == "to be finished":
        yield f"  every shard is there: `make-shards finish {out}` or the same `make-shards pack` writes the manifest"
    elif status.inputs_per_s and status.bytes_per_s and status.time_left_s is not None and status.last_done_s:
        ago = max(0.0, (time.time() if now_s is None else now_s) - status.last_done_s)
        rate = f"{status.inputs_per_s:,.0f} inputs/s, {format_bytes(status.bytes_per_s)}/s"
        if status.inputs_per_worker_s:
            rate += f" ({status.inputs_per_worker_s:,.0f} inputs/s per worker)"
        left = f"about {format_duration(status.time_left_s)} left at this rate"
        yield f"  {rate}, {left}; the newest shard is from {format_duration(ago)} ago"
