"""Command `beton`: a set of shards as one file of FFCV's, and the check of such a file.

The place of every byte follows from the index, so workers copy whole shards into one file, in any order, and the result
is the same for any number of them. FFCV's own writer decodes and encodes again, and hangs when a worker dies.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.ground.digests import crc32c, digest
from shards.ground.errors import PackError
from shards.ground.files import appearing
from shards.ground.locks import locked
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.ground.units import format_bytes
from shards.sets.beton import ALLOCATION, METADATA, METADATA_AT, PAGE_BYTES, BetonSet, Layout, build_head
from shards.sets.local import LocalShardSet
from shards.sets.record import REFUSED
from shards.storage.file_kinds import BETON_SUFFIX
from shards.storage.stores import is_url, split_sets
from shards.tools.verify import Problem, check_image

__all__ = ["verify_beton", "write_beton"]

_TICK_EVERY = 64


def write_beton(folder: str | Path, out: str | Path, *, workers: int, progress: ProgressBars) -> BetonSet:
    """Write a set of shards as a `.beton`; it appears under its name when it is whole and was read back.

    Args:
        folder: local folder that make-shards wrote.
        out: the file to write.
        workers: processes.
        progress: draws bars.

    Raises:
        ValueError: there is no finished set, it holds what FFCV cannot decode, or `out` cannot be written so.
        PackError: a damaged sample, a worker that died, or a file that does not read back as it was written.
    """
    if "://" in str(out) or Path(out).suffix != BETON_SUFFIX:
        raise ValueError(f"--out {out}: FFCV reads local files; give a path that ends in .beton")
    if is_url(str(folder)) or len(split_sets(str(folder))) > 1:
        raise ValueError(f"{folder}: a .beton is made of one folder on this machine; copy the shards there first")
    if Path(folder).suffix == BETON_SUFFIX:
        raise ValueError(f"{folder} is a .beton already: give the folder of shards it was made of")
    out = Path(out)
    shards = LocalShardSet.open(folder)
    _check(shards, out)
    lock = out.with_name(f".{out.name}.lock")
    with locked(lock, holder=str(out)):
        try:
            with appearing(out, durable=True) as aside:
                written = _write(shards, aside, workers, progress)
                problems = _verify(written, decode=False, workers=workers, progress=progress)
                if problems:
                    raise PackError(f"{out} did not read back as it was written ({problems[0]}): it was removed")
        finally:
            lock.unlink(missing_ok=True)
    return BetonSet.open(out)


def verify_beton(
    path: str | Path, *, decode: bool = False, workers: int = 1, progress: ProgressBars | None = None
) -> list[Problem]:
    """Check the tables of a `.beton` and the bytes of every image.

    Args:
        path: the file.
        decode: also decode every pixel.
        workers: processes.
        progress: draws a bar.

    Returns:
        What is wrong, in the order of the samples; empty for a sound file.

    Raises:
        ValueError: it cannot be opened at all.
    """
    shards = BetonSet.open(path)
    return _verify(shards, decode=decode, workers=workers, progress=progress or ProgressBars(enabled=False))


def _check(shards: LocalShardSet, out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or choose another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder: make it, or choose another --out")
    if not shards.num_samples:
        raise ValueError(f"{shards.path} holds no samples: there is nothing to write")
    num_refused, first = 0, ""
    for number in range(shards.num_shards):
        records = shards.index(number)
        refused = np.flatnonzero(records["flags"] & int(REFUSED))
        if refused.size and not num_refused:
            first = f"{shards.manifest.shards[number].name}, sample {records['position'][refused[0]]}"
        num_refused += refused.size
    if num_refused:
        raise ValueError(
            f"{num_refused:,} of {shards.num_samples:,} samples are not sound, upright RGB or gray JPEGs (first: "
            f"{first}): FFCV would show them wrong or not at all; `make-shards pack {shards.path} --out NEW` makes "
            "them so"
        )


def _write(shards: LocalShardSet, path: Path, workers: int, progress: ProgressBars) -> BetonSet:
    # A copy: in the indexes, offsets are those inside the tars.
    records: NDArray[np.void] = np.concatenate([shards.index(number) for number in range(shards.num_shards)])
    page_bytes = _page_bytes(records)
    if page_bytes >= 1 << 32:
        raise ValueError(f"an image has {records['size'].max():,} bytes: a page of a .beton has less than 4 GiB")
    records["offset"] = _place(
        records["size"].astype(np.int64), page_bytes, METADATA_AT + records.size * METADATA.itemsize
    )
    metadata, allocations = _tables(records)
    manifest = shards.manifest.to_json().encode()
    records_at = int(records["offset"][-1]) + int(records["size"][-1])
    records_at += -records_at % 4096
    manifest_at = records_at + records.nbytes
    layout = Layout(
        num_samples=records.size,
        records_at=records_at,
        manifest_at=manifest_at,
        allocations_at=manifest_at + len(manifest),
        digest=digest(metadata, records.tobytes(), manifest, allocations),
    )
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < layout.num_bytes:
        raise PackError(
            f"{path.parent} has {format_bytes(free_bytes)} left, {format_bytes(layout.num_bytes)} are needed: make room"
        )
    with path.open("wb") as file:
        file.write(build_head(layout, page_bytes=page_bytes) + metadata)
        file.seek(records_at)
        file.write(records.tobytes() + manifest + allocations)
    ends = np.cumsum(shards.shard_sizes)
    tasks = list(enumerate(np.split(records["offset"], ends[:-1])))
    with progress.stage("writing", unit=" images", total=records.size) as tick:
        for _ in run_tasks(_Copy(shards, path), tasks, workers=workers, tick=tick):
            pass
    return BetonSet(path, shards.manifest, layout)


def _page_bytes(records: NDArray[np.void]) -> int:
    """Return the size of a page: a power of 2 that holds the largest image."""
    return max(PAGE_BYTES, 1 << (int(records["size"].max()) - 1).bit_length())


def _place(sizes: NDArray[np.int64], page_bytes: int, after: int) -> NDArray[np.int64]:
    """Return (n,) offsets of images of these sizes in the file: in order, none across the border of a page."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    offsets = np.empty_like(sizes)
    page_at = after + -after % page_bytes
    first = 0
    while first < sizes.size:
        limit: int = begins[first].item() + page_bytes
        last = int(np.searchsorted(ends, limit, side="right"))
        offsets[first:last] = page_at + begins[first:last] - begins[first]
        first, page_at = last, page_at + page_bytes
    return offsets


def _tables(records: NDArray[np.void]) -> tuple[bytes, bytes]:
    """Return FFCV's metadata and allocation table."""
    metadata = np.zeros(records.size, dtype=METADATA)
    for name in ("width", "height"):
        metadata["f0"][name] = records[name]
    metadata["f0"]["data_ptr"] = records["offset"]
    metadata["f1"], metadata["f2"] = records["label"], np.arange(records.size)
    allocations = np.zeros(records.size, dtype=ALLOCATION)
    allocations["sample_id"], allocations["ptr"] = metadata["f2"], records["offset"]
    allocations["size"] = records["size"]
    return metadata.tobytes(), allocations.tobytes()


@dataclass(frozen=True)
class _Copy:
    """Copies the images of a shard."""

    shards: LocalShardSet
    target: Path

    def __call__(self, task: tuple[int, NDArray[np.int64]], tick: Tick) -> None:
        number, offsets = task
        path = self.shards.shard_path(number)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        target = os.open(self.target, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            for record, offset in zip(self.shards.index(number), offsets.tolist(), strict=True):
                data = os.pread(source, int(record["size"]), int(record["offset"]))
                if crc32c(data) != record["crc32c"]:
                    raise PackError(
                        f"{path}: sample {record['position']} is damaged, its bytes do not match their crc32c; "
                        f"run `make-shards verify {self.shards.path}`"
                    )
                _write_at(target, data, offset)
                done += 1
                if done == _TICK_EVERY:
                    tick(done)
                    done = 0
            tick(done)
        finally:
            os.close(source)
            os.close(target)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _verify(shards: BetonSet, *, decode: bool, workers: int, progress: ProgressBars) -> list[Problem]:
    problems = [Problem(shard=shards.path.name, sample=None, what=what) for what in _check_tables(shards)]
    if problems:
        # Where the images are is not known.
        return problems
    with progress.stage("verifying", unit=" images", total=shards.num_samples) as tick:
        tasks = list(range(shards.num_shards))
        found = dict(run_tasks(_CheckImages(shards, decode), tasks, workers=workers, tick=tick))
    return [problem for number in sorted(found) for problem in found[number]]


def _check_tables(shards: BetonSet) -> list[str]:
    """Return what is wrong with all but the images."""
    layout = shards.layout
    records = np.array(shards.records)
    metadata, allocations = _tables(records)
    with shards.path.open("rb") as file:
        head = file.read(METADATA_AT)
        metadata_found = file.read(len(metadata))
        file.seek(layout.records_at)
        tail = file.read()
    if digest(metadata_found, tail) != layout.digest:
        return ["its tables have changed since it was written: write it again"]
    found = (head, metadata_found, tail[layout.allocations_at - layout.records_at :])
    if found != (build_head(layout, page_bytes=_page_bytes(records)), metadata, allocations):
        return ["what FFCV reads is not what its index says: write it again"]
    return []


@dataclass(frozen=True)
class _CheckImages:
    """Checks the images of what was a shard."""

    shards: BetonSet
    decode: bool

    def __call__(self, number: int, tick: Tick) -> list[Problem]:
        problems: list[Problem] = []
        with self.shards.path.open("rb") as file:
            for record in self.shards.index(number):
                file.seek(int(record["offset"]))
                data = file.read(int(record["size"]))
                problems += (self._problem(record, what) for what in check_image(data, record, decode=self.decode))
        tick(int(self.shards.shard_sizes[number]))
        return problems

    def _problem(self, record: Any, what: str) -> Problem:
        return Problem(shard=self.shards.path.name, sample=str(record["position"]), what=what)
