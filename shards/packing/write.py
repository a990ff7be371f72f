"""Writer of one shard of a plan: the tar, its index, and the files beside them."""

import io
import json
import os
import time
import uuid
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.config import EncodeConfig
from shards.ground.arrays import LabelSets
from shards.ground.digests import crc32c, digest
from shards.ground.errors import PackError, Rejected
from shards.ground.files import write_synced
from shards.ground.progress import Tick
from shards.images.encode import PackedImage
from shards.packing.as_is import packed_image
from shards.packing.inputs import read_inputs
from shards.packing.plan import PackPlan, ShardTask, cached_plan
from shards.packing.records import Finished, put_record
from shards.sets.manifest import ShardEntry
from shards.sets.record import ANNOTATED, RECORD, Flag, npy_header
from shards.sources import Source
from shards.sources.benchmarks import BenchmarkSource
from shards.storage.file_kinds import FILES_SUFFIX, LABEL_SETS_SUFFIX, SHARD_SUFFIXES
from shards.storage.tar import TarWriter
from shards.storage.target import Target, path_in

__all__ = ["KEY_DIGITS", "NEAR_UNIFORM", "WriteShard", "shard_stem"]

KEY_DIGITS = 12
NEAR_UNIFORM = "near-uniform"
"""Outcome of an image that is nearly one color, beside what was done to it."""


def shard_stem(shard: int) -> str:
    """Return the name of a shard's files without their suffix."""
    return f"shard-{shard:06d}"


class _Beside:
    """What is written beside a shard, collected while its tar is written.

    Args:
        plan: whose shard it is.
    """

    def __init__(self, plan: PackPlan) -> None:
        self._label_sets = plan.label_sets
        self.has_sets = plan.label_sets is not None
        self.members: list[str] | None = [] if plan.settings.get(ANNOTATED) else None
        """Of a benchmark: its files in the tar, as JSON."""
        self._sets: list[int] = []
        self.records: list[tuple[Any, ...]] = []
        self.sources: list[str] = []
        self.idx: list[str] = []
        self.rejected: list[dict[str, Any]] = []
        self.uniform: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.jpegs: Counter[str] = Counter()

    def add(self, position: int, image: PackedImage, label: int, offset: int, source: str) -> None:
        flags = image.flags | (0 if image.mean_rgb is None else int(Flag.HAS_MEAN_RGB))
        crc = crc32c(image.data)
        mean = image.mean_rgb or (0, 0, 0)
        size = len(image.data)
        if self._label_sets is not None:
            self._sets.append(label)
            label = -1
        self.records.append((position, offset, size, image.width, image.height, label, crc, mean, flags))
        self.sources.append(source)
        self.outcomes.update(image.outcomes)
        self.jpegs[image.kind] += 1
        if image.is_uniform:
            self.uniform.append({"key": f"{position:0{KEY_DIGITS}d}", "source": source})
            self.outcomes[NEAR_UNIFORM] += 1

    def reject(self, position: int, source: str, rejected: Rejected) -> None:
        key = f"{position:0{KEY_DIGITS}d}"
        self.rejected.append({"key": key, "source": source, "reason": rejected.reason, "detail": rejected.detail})
        self.rejections[rejected.reason] += 1

    def files(self) -> dict[str, bytes]:
        """Return the content of each file beside the tar, by suffix."""
        records = np.array(self.records, dtype=RECORD)
        # DALI's format: a header line, then extension, offset, size and name of each member of a sample.
        idx = f"v1.2 {len(self.idx)}\n" + "".join(self.idx)
        sources = "".join(f"{line}\n" for line in self.sources)
        sets = {} if self._label_sets is None else {LABEL_SETS_SUFFIX: self._set_rows(self._label_sets)}
        files = {} if self.members is None else {FILES_SUFFIX: "".join(self.members).encode()}
        return (
            sets
            | files
            | {
                ".index.npy": npy_header(len(records)) + records.tobytes(),
                ".sources.txt": sources.encode(),
                ".idx": idx.encode(),
            }
        )

    def _set_rows(self, label_sets: LabelSets) -> bytes:
        # An input without a set: nothing is known of any class.
        rows = np.concatenate([label_sets, np.full((1, label_sets.shape[1]), -1, dtype=np.int8)])[self._sets]
        buffer = io.BytesIO()
        np.save(buffer, rows)
        return buffer.getvalue()


@dataclass(frozen=True)
class WriteShard:
    """The job of writing one shard, for a worker process. Same plan, same bytes."""

    plan: str
    """Name of its folder in the target."""
    target: Target
    config: EncodeConfig

    def __call__(self, task: ShardTask, tick: Tick) -> Finished:
        """Write a shard, then the record that it is finished, which is returned."""
        target, stem = self.target, shard_stem(task.shard)
        plan = cached_plan(target.address(self.plan), target.work / "spools")
        split = plan.splits[task.split].name
        more = {LABEL_SETS_SUFFIX: plan.label_sets is not None, FILES_SUFFIX: bool(plan.settings.get(ANNOTATED))}
        suffixes = (*SHARD_SUFFIXES, *(suffix for suffix, is_written in more.items() if is_written))
        begin_s = time.time()
        # Two machines may be at the same shard, in one folder and with equal process numbers.
        own = uuid.uuid4().hex[:8]
        temporary = {suffix: target.scratch / f"{task.split}-{stem}{suffix}.{own}" for suffix in suffixes}
        try:
            entry, beside = _write_files(plan, task, self.config, temporary, tick)
            target.publish({path_in(split, f"{stem}{suffix}"): path for suffix, path in temporary.items()})
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
        finished = Finished(entry=entry, span=(begin_s, time.time()), part=target.part)
        put_record(target, task, finished, {"rejected": beside.rejected, "uniform": beside.uniform})
        return finished


def _write_files(
    plan: PackPlan, task: ShardTask, config: EncodeConfig, paths: dict[str, Path], tick: Tick
) -> tuple[ShardEntry, _Beside]:
    beside = _Beside(plan)
    fd = os.open(paths[".tar"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    tar = TarWriter(fd)
    try:
        with closing(read_inputs(plan, plan.shard(task))) as inputs:
            for position, (source, name, label, data) in zip(plan.positions(task), inputs, strict=True):
                try:
                    if isinstance(data, Rejected):
                        raise data
                    image = packed_image(data, config)
                except Rejected as rejected:
                    beside.reject(position, source.describe(name), rejected)
                    tick(1)
                except PackError as error:
                    raise PackError(f"{source.describe(name)}: {error}") from None
                else:
                    _add_sample(tar, beside, position, image, label, source, name)
                    tick(1, len(image.data))
        digests = {".tar": tar.finish()}
    finally:
        tar.close()
        os.close(fd)
    for suffix, data in beside.files().items():
        write_synced(paths[suffix], data)
        digests[suffix] = digest(data)
    return _entry(task, tar.num_bytes, digests, beside), beside


def _add_sample(
    tar: TarWriter, beside: _Beside, position: int, image: PackedImage, label: int, source: Source, name: bytes
) -> None:
    key = f"{position:0{KEY_DIGITS}d}"
    offset, line = _add_member(tar, key, image.extension, image.data)
    if label >= 0 and not beside.has_sets:
        line += f" {_add_member(tar, key, 'cls', b'%d' % label)[1]}"
    if beside.members is not None:
        assert isinstance(source, BenchmarkSource)
        size = {"width": image.width, "height": image.height, "orientation": image.orientation}
        beside.members.append(_file_line(os.fsdecode(name), offset, image.data, **size))
        for member in source.members(name):
            at, more = _add_member(tar, key, member.extension, member.data)
            beside.members.append(_file_line(member.path, at, member.data))
            line += f" {more}"
    beside.idx.append(line + "\n")
    beside.add(position, image, label, offset, source.describe(name))


def _add_member(tar: TarWriter, key: str, extension: str, data: bytes) -> tuple[int, str]:
    """Return the offset of a member's data, and what DALI's index says of it."""
    name = f"{key}.{extension}"
    offset = tar.add(name.encode(), data)
    return offset, f"{extension} {offset} {len(data)} {name}"


def _file_line(path: str, offset: int, data: bytes, **more: int) -> str:
    return json.dumps({"path": path, "offset": offset, "size": len(data), "crc32c": crc32c(data), **more}) + "\n"


def _entry(task: ShardTask, num_bytes: int, digests: dict[str, str], beside: _Beside) -> ShardEntry:
    records = np.array(beside.records, dtype=RECORD)
    return ShardEntry(
        name=f"{shard_stem(task.shard)}.tar",
        num_samples=len(records),
        num_rejected=len(beside.rejected),
        num_bytes=num_bytes,
        digests=digests,
        max_width=int(records["width"].max(initial=0)),
        max_height=int(records["height"].max(initial=0)),
        max_bytes=int(records["size"].max(initial=0)),
        outcomes=dict(sorted(beside.outcomes.items())),
        rejections=dict(sorted(beside.rejections.items())),
        jpegs=dict(sorted(beside.jpegs.items())),
    )
