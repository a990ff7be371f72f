"""Reader of samples' bytes in shards: positioned reads by a few threads, each sample checked against its crc32c."""

import resource
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards import ShardSet
from shards.ground.arrays import Encoded, Indices
from shards.ground.digests import crc32c
from shards.sets.base import grouped
from shards.sets.record import RECORD
from shards.sets.remote import RANGE_THREADS
from shards.sets.shard_file import ShardFile

__all__ = ["READ_THREADS", "DamagedSampleError", "Outcome", "PendingBytes", "Reader", "name_sample"]

READ_THREADS = 4
"""Threads that read shards, where none are named."""


# Records of the shards in use are kept in memory, not mapped: a mapping costs a file descriptor, and a step touches
# several shards of each lane. Where more are in use than this is for, they are kept as well: else every step would open
# its shards again.
_RECORDS_BYTES = 128 << 20
_OPEN_SHARDS = 256
# Reads that a thread is woken for. The threads that a small batch leaves over have those of the next one.
_SHORTEST_RUN = 16
# How long a shard that a cache has evicted may stay open. Asking at every batch cost a tenth of reading it.
_KEPT_DELETED_S = 1.0


class DamagedSampleError(ValueError):
    """A sample's bytes are not those that were packed."""


Outcome = Encoded | DamagedSampleError


class PendingBytes:
    """Encoded images on their way."""

    def __init__(self, images: list[Encoded], parts: "list[Future[list[tuple[int, DamagedSampleError]]]]") -> None:
        self._images = images
        self._parts = parts

    def outcomes(self) -> list[Outcome]:
        """Wait for all of them, in the order they were asked for; an error for each that is damaged. Raises OSError."""
        outcomes: list[Outcome] = list(self._images)
        for part in self._parts:
            for place, error in part.result():
                outcomes[place] = error
        return outcomes

    def result(self) -> list[Encoded]:
        """Wait for all of them, in the order they were asked for. Raises DamagedSampleError or OSError."""
        for outcome in self.outcomes():
            if isinstance(outcome, DamagedSampleError):
                raise outcome
        return self._images


class Reader:
    """Samples of a set by their dense numbers. `records` and `submit` belong to one thread; the reads run in others.

    Args:
        shards: the set.
        num_threads: that read.
        in_use: shards that are read side by side; so many stay open, with their records in memory, as far as the
            process may have files open.
    """

    def __init__(self, shards: ShardSet, *, num_threads: int = READ_THREADS, in_use: int = 0) -> None:
        self._shards = shards
        sizes = shards.shard_sizes
        self._starts: Indices = np.cumsum(sizes) - sizes
        in_use = min(in_use, shards.num_shards, _most_files())
        self._most_open = max(in_use, _OPEN_SHARDS)
        self._records = _RecordCache(shards, max(_RECORDS_BYTES, in_use * int(sizes.max()) * RECORD.itemsize))
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._reads_ranges = shards.reads_ranges
        self._num_threads = max(num_threads, RANGE_THREADS) if self._reads_ranges else num_threads
        self._shortest_run = 1 if self._reads_ranges else _SHORTEST_RUN
        self._asked_s = time.monotonic()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="read-shards")

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """Turn dense sample numbers into (shard, number within the shard), both (n,) int64."""
        shard = np.searchsorted(self._starts, samples, side="right") - 1
        return shard, samples - self._starts[shard]

    def records(self, samples: Indices) -> npt.NDArray[np.void]:
        """Index records of samples: (n,) of shards.sets.record.RECORD."""
        if self._reads_ranges:
            return self._shards.records_of(samples)
        shard, local = self.locate(samples)
        return self._records.gather(shard, local)

    def submit(self, samples: Indices, records: npt.NDArray[np.void], *, into: Encoded | None = None) -> PendingBytes:
        """Start to read the encoded bytes of samples, one behind the other into a buffer; into a new one if not given.

        Raises:
            ValueError: the samples are larger than the buffer.
        """
        shard, _ = self.locate(samples)
        ends = np.cumsum(records["size"], dtype=np.int64)
        num_bytes = int(ends[-1]) if len(ends) else 0
        buffer = np.empty(num_bytes, dtype=np.uint8) if into is None else into
        if num_bytes > len(buffer):
            raise ValueError(
                f"{self._shards.shard_name(int(shard[records['size'].argmax()]))}: its index has larger samples than "
                "manifest.json: it is damaged or of another set; `make-shards verify` says more"
            )
        begins = (ends - records["size"]).tolist()
        images = [buffer[begin:end] for begin, end in zip(begins, ends.tolist(), strict=True)]
        self._drop_deleted()
        # Sorted by place on disk, and split into runs of it: neighbors are read one after the other.
        places: list[int] = np.lexsort((records["offset"], shard)).tolist()
        shards, offsets, checksums = shard.tolist(), records["offset"].tolist(), records["crc32c"].tolist()
        wanted = [
            _Wanted(place, self._open(shards[place]), images[place], offsets[place], checksums[place])
            for place in places
        ]
        num_runs = max(1, min(self._num_threads, len(wanted) // self._shortest_run))
        bounds = [len(wanted) * run // num_runs for run in range(num_runs + 1)]
        runs = [wanted[begin:end] for begin, end in pairwise(bounds)]
        return PendingBytes(images, [self._pool.submit(_read_all, run, samples, records) for run in runs])

    def describe(self, sample: int) -> str:
        """Name a sample: its shard, its dense number and its key."""
        key = int(self.records(np.array([sample]))["position"][0])
        return name_sample(self._shards, sample, key)

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return self._shards.num_samples

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.clear()

    def _open(self, shard: int) -> ShardFile:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = self._shards.open_shard(shard)
            if len(self._files) > self._most_open:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(shard)
        return file

    def _drop_deleted(self) -> None:
        """Close what a cache has evicted: until then its disk space is not free."""
        now_s = time.monotonic()
        if now_s - self._asked_s < _KEPT_DELETED_S:
            return
        self._asked_s = now_s
        for shard in [shard for shard, file in self._files.items() if file.is_deleted]:
            del self._files[shard]


def name_sample(shards: ShardSet, sample: int, key: int) -> str:
    """Name a sample: its shard, its dense number and its key."""
    shard = int(np.searchsorted(shards.shard_sizes.cumsum(), sample, side="right"))
    return f"{shards.shard_name(shard)}: sample {sample} (key {key})"


class _Wanted(NamedTuple):
    """A read: the image's place in its batch, and where its bytes are."""

    place: int
    file: ShardFile
    image: Encoded
    offset: int
    checksum: int
    """CRC-32C."""


def _read_all(
    wanted: list[_Wanted], samples: Indices, records: npt.NDArray[np.void]
) -> list[tuple[int, DamagedSampleError]]:
    """Read each image and check it; give (place, what is wrong) of the damaged ones."""
    damaged: list[tuple[int, DamagedSampleError]] = []
    for place, file, image, offset, checksum in wanted:
        num_read = file.read_into(image, offset)
        if num_read < len(image):
            reason = f"the shard ends {len(image) - num_read} bytes too early"
        elif crc32c(image) != checksum:
            reason = "its bytes do not match their crc32c"
        else:
            continue
        damaged.append((place, _damaged(file.name, int(samples[place]), records[place], reason)))
    # An evicted shard is closed when the last read from it is done, not when the pool lets go of its arguments.
    wanted.clear()
    return damaged


def _damaged(name: str, sample: int, record: np.void, reason: str) -> DamagedSampleError:
    begin, size = int(record["offset"]), int(record["size"])
    return DamagedSampleError(
        f"{name}: sample {sample} (key {record['position']}, bytes {begin} to {begin + size}) is damaged: {reason}; "
        f"run `make-shards verify {name.rpartition('/')[0]}`"
    )


def _most_files() -> int:
    """Three quarters of the files that this process may have open: the rest is for its libraries."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft * 3 // 4


class _RecordCache:
    """Index records of the shards used last, up to a number of bytes."""

    def __init__(self, shards: ShardSet, most_bytes: int) -> None:
        self._shards = shards
        self._most_bytes = most_bytes
        self._kept: OrderedDict[int, npt.NDArray[np.void]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def gather(self, shard: Indices, local: Indices) -> npt.NDArray[np.void]:
        records = np.empty(len(shard), dtype=RECORD)
        with self._lock:
            for number, places in grouped(shard):
                records[places] = self._of(number)[local[places]]
        return records

    def _of(self, shard: int) -> npt.NDArray[np.void]:
        kept = self._kept.get(shard)
        if kept is not None:
            self._kept.move_to_end(shard)
            return kept
        records = np.array(self._shards.index(shard))
        self._kept[shard] = records
        self._bytes += records.nbytes
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return records
