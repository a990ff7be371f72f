"""Reading samples' bytes out of shards: positioned reads by a few threads, each sample checked against its crc32c."""

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from shards import ShardSet

__all__ = ["DamagedSampleError", "Outcome", "PendingBytes", "Reader"]

Indices = npt.NDArray[np.int64]
Encoded = npt.NDArray[np.uint8]

# Records of the shards in use are kept in memory, not mapped: a mapping costs a file descriptor, and a step touches
# several shards a lane.
_RECORDS_BYTES = 128 << 20
_OPEN_SHARDS = 256


class DamagedSampleError(ValueError):
    """A sample's bytes are not those that were packed."""


Outcome = Encoded | DamagedSampleError


class PendingBytes:
    """Encoded images on their way."""

    def __init__(self, parts: list[Future[list[tuple[int, Outcome]]]]) -> None:
        self._parts = parts

    def outcomes(self) -> list[Outcome]:
        """Wait for all of them, in the order they were asked for; an error for each that is damaged. Raises OSError."""
        by_place = dict(pair for part in self._parts for pair in part.result())
        return [by_place[place] for place in range(len(by_place))]

    def result(self) -> list[Encoded]:
        """Wait for all of them, in the order they were asked for. Raises DamagedSampleError or OSError."""
        images: list[Encoded] = []
        for outcome in self.outcomes():
            if isinstance(outcome, DamagedSampleError):
                raise outcome
            images.append(outcome)
        return images


class Reader:
    """Samples of a set by their dense numbers. `records` and `submit` belong to one thread; the reads run in others."""

    def __init__(self, shards: ShardSet, *, num_threads: int = 4) -> None:
        self._shards = shards
        sizes = shards.shard_sizes
        self._starts: Indices = np.cumsum(sizes) - sizes
        self._records = _RecordCache(shards)
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-shards")

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """Turn dense sample numbers into (shard, number within the shard), both (n,) int64."""
        shard = np.searchsorted(self._starts, samples, side="right") - 1
        return shard, samples - self._starts[shard]

    def records(self, samples: Indices) -> npt.NDArray[np.void]:
        """Index records of samples: (n,) of shards.index.RECORD."""
        shard, local = self.locate(samples)
        return self._records.gather(shard, local)

    def submit(self, samples: Indices, records: npt.NDArray[np.void]) -> PendingBytes:
        """Start to read the encoded bytes of samples."""
        shard, _ = self.locate(samples)
        # Sorted by place on disk, and split into runs of it: neighbours are read one after the other.
        places = np.lexsort((records["offset"], shard))
        parts: list[Future[list[tuple[int, Outcome]]]] = []
        for run in np.array_split(places, min(self._num_threads, len(places))):
            wanted = [
                _Wanted(file=self._open(s), place=p, sample=n, position=k, offset=o, size=b, crc32c=c)
                for s, p, n, k, o, b, c in zip(
                    shard[run].tolist(),
                    run.tolist(),
                    samples[run].tolist(),
                    *(records[name][run].tolist() for name in ("position", "offset", "size", "crc32c")),
                    strict=True,
                )
            ]
            parts.append(self._pool.submit(_read_all, wanted))
        return PendingBytes(parts)

    def describe(self, sample: int) -> str:
        """Name a sample: its shard's path, its dense number and its key."""
        shard, _ = self.locate(np.array([sample]))
        key = int(self.records(np.array([sample]))["position"][0])
        return f"{self._shards.shard_path(int(shard[0]))}: sample {sample} (key {key})"

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return self._shards.num_samples

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.clear()

    def _open(self, shard: int) -> "_ShardFile":
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _ShardFile(self._shards.shard_path(shard))
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(shard)
        return file


@dataclass(frozen=True, slots=True)
class _Wanted:
    file: "_ShardFile"
    place: int
    sample: int
    position: int
    offset: int
    size: int
    crc32c: int


class _ShardFile:
    """An open shard. It closes with its last reference, so an evicted one outlives the reads under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is listed in manifest.json but absent: restore it, or run `make-shards verify {path.parent}`"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read_all(wanted: list[_Wanted]) -> list[tuple[int, Outcome]]:
    images: list[tuple[int, Outcome]] = []
    for one in wanted:
        try:
            images.append((one.place, _read(one)))
        except DamagedSampleError as error:
            images.append((one.place, error))
    # An evicted shard is closed when the last read from it is done, not when the pool lets go of its arguments.
    wanted.clear()
    return images


def _read(wanted: _Wanted) -> Encoded:
    data = os.pread(wanted.file.descriptor, wanted.size, wanted.offset)
    while len(data) < wanted.size:
        more = os.pread(wanted.file.descriptor, wanted.size - len(data), wanted.offset + len(data))
        if not more:
            raise DamagedSampleError(_describe(wanted, f"the shard ends {wanted.size - len(data)} bytes too early"))
        data += more
    if google_crc32c.value(data) != wanted.crc32c:
        raise DamagedSampleError(_describe(wanted, "its bytes do not match their crc32c"))
    return np.frombuffer(data, dtype=np.uint8)


def _describe(wanted: _Wanted, reason: str) -> str:
    path = wanted.file.path
    return (
        f"{path}: sample {wanted.sample} (key {wanted.position}, bytes {wanted.offset} to "
        f"{wanted.offset + wanted.size}) is damaged: {reason}; run `make-shards verify {path.parent}`"
    )


class _RecordCache:
    """Index records of the shards used last, up to a number of bytes."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._kept: OrderedDict[int, npt.NDArray[np.void]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def gather(self, shard: Indices, local: Indices) -> npt.NDArray[np.void]:
        by_shard = np.argsort(shard, kind="stable")
        unique, begins = np.unique(shard[by_shard], return_index=True)
        with self._lock:
            pieces = [
                self._of(int(s))[local[places]]
                for s, places in zip(unique, np.split(by_shard, begins[1:]), strict=True)
            ]
        records = np.concatenate(pieces)
        result = np.empty_like(records)
        result[by_shard] = records
        return result

    def _of(self, shard: int) -> npt.NDArray[np.void]:
        kept = self._kept.get(shard)
        if kept is not None:
            self._kept.move_to_end(shard)
            return kept
        records = np.array(self._shards.index(shard))
        self._kept[shard] = records
        self._bytes += records.nbytes
        while self._bytes > _RECORDS_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return records
