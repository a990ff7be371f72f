"""Command `index`: index and manifest for WebDataset tars that someone else wrote, which stay as they are."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.config import WORK_FOLDER, SourceOptions
from shards.ground.digests import crc32c, digest, digest_file
from shards.ground.errors import PackError, Rejected
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.ground.units import counted
from shards.packing.as_is import TALLIED, look_at
from shards.packing.aside import LeftAside, describe_aside
from shards.packing.labels import ClassTable
from shards.sets.manifest import MANIFEST_NAME, Manifest, ShardEntry, ShardTable
from shards.sets.record import INDEXED, RECORD, Flag, flag_name, npy_header
from shards.sets.shard_folder import ShardFolder
from shards.sources.base import Aside, Input, LabelSet, printable
from shards.sources.tarfiles import TarSource
from shards.storage.file_kinds import ASIDE_NAME, REJECTED_NAME
from shards.storage.tar import TarError
from shards.storage.tar_reading import SPARSE

__all__ = ["Indexed", "advice", "index_folder"]

_LONG_RUN = 1000
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """What was found in the tars."""

    manifest: Manifest
    flagged: dict[str, int]
    """Samples by what a decoder may fail on or slow down for; a sample can count more than once."""
    examples: dict[str, list[str]]
    """A few samples of each kind."""
    longest_run: int
    """Most samples in a row, in the order of the tars, that share a label."""


@dataclass(frozen=True, kw_only=True)
class _Shard:
    entry: ShardEntry
    records: NDArray[np.void]
    """Without labels and positions, which depend on the other tars."""
    labels: list[str | int | None]
    names: list[str]
    idx: list[str]
    rejected: list[dict[str, str]]
    """Lines of rejected.jsonl."""
    aside: LeftAside


@dataclass(frozen=True)
class _IndexTar:
    folder: ShardFolder
    options: SourceOptions

    def __call__(self, name: str, tick: Tick) -> _Shard:
        with self.folder.local([name]) as local:
            return self._index(local / name, tick)

    def _index(self, path: Path, tick: Tick) -> _Shard:
        root = f"{self.folder.where.rstrip('/')}/"
        found = _Looked(printable(os.fsencode(root)))
        source = TarSource(f"{root}{path.name}", self.options, root=str(path))
        with tempfile.TemporaryDirectory(dir=self.folder.work_folder) as spool:
            for item in source.inputs(Path(spool) / "unpacked"):
                if isinstance(item, Aside):
                    found.aside.add(source, item)
                elif isinstance(item, Input):
                    found.look_at(source, item)
                    tick(1, max(0, item.size))
            if source.is_unpacked:
                raise PackError(
                    f"{source.path} is compressed: its images cannot be read where they are. Pack it with "
                    "`make-shards pack`, or decompress it first"
                )
        records = np.array(found.records, dtype=RECORD)
        return _Shard(
            entry=_entry(path, records, found),
            records=records,
            labels=found.labels,
            names=found.names,
            idx=found.idx,
            rejected=found.rejected,
            aside=found.aside,
        )


class _Looked:
    """What was found in a tar so far.

    Args:
        root: address of the folder with a slash, which places are told from: they are the same wherever the set lies.
    """

    def __init__(self, root: str) -> None:
        self.records: list[tuple[Any, ...]] = []
        self.labels: list[str | int | None] = []
        self.names: list[str] = []
        self.idx: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.rejected: list[dict[str, str]] = []
        self.rejections: Counter[str] = Counter()
        self.aside = LeftAside(root)
        self._root = root

    def look_at(self, source: TarSource, item: Input) -> None:
        """Add a sample, or a line that says why it is none."""
        # Sets of classes are known of shards of ours alone, which have an index.
        assert not isinstance(item.label, LabelSet)
        try:
            data = source.read(item.name, item.offset, item.size)
            if item.size == SPARSE:
                raise Rejected("sparse file", "its bytes are not in one piece in the archive")
            if not data:
                raise Rejected("empty")
            width, height, flags, kind = look_at(data)
        except Rejected as rejected:
            where = source.describe(item.name).removeprefix(self._root)
            self.rejected.append({"source": where, "reason": rejected.reason, "detail": rejected.detail})
            self.rejections[rejected.reason] += 1
            return
        crc = crc32c(data)
        self.records.append((0, item.offset, item.size, width, height, -1, crc, (0, 0, 0), int(flags)))
        self.kinds[kind] += 1
        self.labels.append(item.label)
        self.names.append(printable(item.name))
        base = os.fsdecode(item.name.rpartition(b"/")[2])
        self.idx.append(f"{base.partition('.')[2]} {item.offset} {item.size} {self.names[-1]}\n")


def _entry(path: Path, records: NDArray[np.void], found: _Looked) -> ShardEntry:
    return ShardEntry(
        name=path.name,
        num_samples=len(records),
        num_rejected=len(found.rejected),
        num_bytes=path.stat().st_size,
        digests={".tar": digest_file(path)},
        max_width=int(records["width"].max(initial=0)),
        max_height=int(records["height"].max(initial=0)),
        max_bytes=int(records["size"].max(initial=0)),
        outcomes=_outcomes(records),
        rejections=dict(sorted(found.rejections.items())),
        jpegs=dict(sorted(found.kinds.items())),
    )


def _outcomes(records: NDArray[np.void]) -> dict[str, int]:
    """Count all samples, and those with each flag that a loader must know of before it starts."""
    tally = {flag_name(flag): int(((records["flags"] & flag) != 0).sum()) for flag in TALLIED}
    return {what: count for what, count in {"indexed": len(records), **tally}.items() if count}


def index_folder(
    folder: str,
    *,
    workers: int,
    work_folder: str = WORK_FOLDER,
    options: SourceOptions | None = None,
    progress: ProgressBars | None = None,
) -> Indexed:
    """Write indexes and a manifest beside the tars of a folder. The tars are only read.

    Args:
        folder: path, or address of a bucket's folder.
        workers: processes.
        work_folder: local folder for the tars of a bucket, one for each worker at a time.
        options: which members are samples, and what their labels are.
        progress: draws a bar.

    Raises:
        ValueError: no tars there, or they are described already; or samples hold several images.
        PackError: a tar cannot be read to its end.
    """
    described = ShardFolder(where=folder, work_folder=work_folder)
    if described.has_manifest():
        raise ValueError(f"{folder} has a {MANIFEST_NAME} already: `make-shards verify {folder}` checks it")
    if (target := described.packing()) is not None:
        raise ValueError(
            f"{folder} is not finished, so a manifest of what is there would be one of a part: run the same "
            f"`make-shards pack` command again, or `make-shards finish {target}`"
        )
    names = described.tars()
    if not names:
        raise ValueError(f"{folder} holds no .tar: give the folder of the shards")
    found: dict[str, _Shard] = {}
    with (progress or ProgressBars(enabled=False)).stage("indexing", unit=" images") as tick:
        try:
            found.update(run_tasks(_IndexTar(described, options or SourceOptions()), names, workers=workers, tick=tick))
        except TarError as error:
            raise PackError(str(error)) from error
    shards = [found[name] for name in names]
    classes = ClassTable()
    provisional = [np.array([classes.number(label) for label in s.labels], dtype=np.int64) for s in shards]
    class_names, final = classes.resolve(need_two=False)
    labels = [np.where(p < 0, -1, final[p]) if len(final) else np.full(len(p), -1) for p in provisional]
    entries = list(_write(described, shards, labels))
    aside = "".join(shard.aside.text() for shard in shards)
    rejected = "".join(json.dumps(line, ensure_ascii=False) + "\n" for shard in shards for line in shard.rejected)
    for name, text in ((REJECTED_NAME, rejected), (ASIDE_NAME, aside)):
        if text:
            described.put(name, text.encode())
    manifest = _manifest(entries, class_names, sum((Counter(s.aside.counts) for s in shards), Counter[str]()))
    described.put_manifest(manifest)
    return _summary(manifest, shards, labels)


def _write(folder: ShardFolder, shards: list[_Shard], labels: list[NDArray[np.int64]]) -> Iterator[ShardEntry]:
    first = 0
    for shard, own in zip(shards, labels, strict=True):
        records = shard.records
        records["position"] = np.arange(first, first + len(records))
        records["label"] = own
        first += len(records)
        files = {
            ".index.npy": npy_header(len(records)) + records.tobytes(),
            ".sources.txt": "".join(f"{name}\n" for name in shard.names).encode(),
            ".idx": (f"v1.2 {len(shard.idx)}\n" + "".join(shard.idx)).encode("utf-8", "surrogateescape"),
        }
        for suffix, data in files.items():
            folder.put(f"{shard.entry.stem}{suffix}", data)
        digests = {suffix: digest(data) for suffix, data in files.items()}
        yield replace(shard.entry, digests={**shard.entry.digests, **digests})


def _manifest(entries: list[ShardEntry], class_names: tuple[str, ...], aside: Counter[str]) -> Manifest:
    num_samples, num_rejected = (
        sum(entry.num_samples for entry in entries),
        sum(entry.num_rejected for entry in entries),
    )
    return Manifest(
        shards=ShardTable.of(entries),
        class_names=class_names,
        num_inputs=num_samples + num_rejected,
        num_samples=num_samples,
        num_rejected=num_rejected,
        max_width=max(entry.max_width for entry in entries),
        max_height=max(entry.max_height for entry in entries),
        max_bytes=max(entry.max_bytes for entry in entries),
        outcomes=_sum(entry.outcomes for entry in entries),
        rejections=_sum(entry.rejections for entry in entries),
        left_aside=dict(sorted(aside.items())),
        jpegs=_sum(entry.jpegs for entry in entries),
        settings={INDEXED: True},
    )


def _sum(tallies: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, tallies), Counter[str]()))


def _summary(manifest: Manifest, shards: list[_Shard], labels: list[NDArray[np.int64]]) -> Indexed:
    flagged: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for shard in shards:
        for name, flags in zip(shard.names, shard.records["flags"].tolist(), strict=True):
            for flag in Flag(flags) & TALLIED:
                kind = flag_name(flag)
                flagged[kind] += 1
                if len(examples.setdefault(kind, [])) < _EXAMPLES:
                    examples[kind].append(f"{shard.entry.name}/{name}")
    run = _longest_run(np.concatenate(labels)) if manifest.class_names else 0
    return Indexed(manifest=manifest, flagged=dict(flagged), examples=examples, longest_run=run)


def _longest_run(labels: NDArray[np.int64]) -> int:
    if not len(labels):
        return 0
    changes = np.flatnonzero(np.diff(labels)) + 1
    edges = np.concatenate([[0], changes, [len(labels)]])
    return int(np.diff(edges).max())


def advice(indexed: Indexed, folder: str) -> Iterator[str]:
    """Return lines about what is not a sample, and about tars that training cannot read as well as it could."""
    manifest = indexed.manifest
    if manifest.num_rejected:
        tally = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejections.items())
        yield f"  rejected {manifest.num_rejected:,} of {manifest.num_inputs:,} ({tally}): see {REJECTED_NAME}"
    if manifest.left_aside:
        yield f"  {describe_aside(manifest.left_aside)}: see {ASIDE_NAME}"
    for kind, count in indexed.flagged.items():
        yield f"  {kind}: {counted(count, 'sample')}, such as {', '.join(indexed.examples[kind])}"
    samples = indexed.manifest.num_samples
    is_sorted = indexed.longest_run > max(_LONG_RUN, 2 * samples // max(1, len(indexed.manifest.class_names)) // 3)
    if is_sorted:
        yield f"  {indexed.longest_run:,} samples in a row share one label: batches would be far from random"
    if indexed.flagged or is_sorted:
        yield f"  to fix this: make-shards pack {folder} --out {folder.rstrip('/')}-packed"
