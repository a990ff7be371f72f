"""Decoded cache: pixels of samples in one file, shared by all processes of a machine and filled as samples are decoded.

    FOLDER/<set and decoder>.pixels     bytes in use (8); a table with an ENTRY per sample; pixels as they were decoded

A sample's place is reserved under a lock of the file's first bytes, its pixels are written, and then the two checksums
of its entry. Until then it counts as not there: a process that is killed leaves a place that the next one that decodes
the sample writes to. Pixels are copied out before their checksum is compared, so what other processes write meanwhile,
damage on disk and a power cut cost time at most: the sample is decoded again. Whoever uses a file holds it locked
(shared), so others do not remove it.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.reading.reader import Reader
from pipelines.reading.samples import Good, PendingSamples
from shards.ground.arrays import Encoded, Indices, Pixels, Records
from shards.ground.digests import crc32c, short_digest
from shards.ground.locks import open_locked, remove_unlocked
from shards.ground.units import gib
from shards.sets import ShardSet

__all__ = ["DecodedCache", "DecodedFile", "PendingDecoded"]


_FORMAT = 1
_ENTRY = np.dtype(
    [
        ("offset", "<u8"),  # of the pixels in the file; 0: no place is reserved
        ("encoded_crc32c", "<u4"),  # of the encoded bytes that were decoded; 0 until the pixels are written
        ("crc32c", "<u4"),  # of the pixels
    ]
)
_USED_BYTES = 8
_PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class DecodedCache:
    """A file of decoded pixels, before it is opened. Can be pickled."""

    path: Path
    num_samples: int
    budget_bytes: int
    """Largest size of the file."""

    @classmethod
    def of(cls, shards: ShardSet, folder: Path, *, budget_bytes: int) -> "DecodedCache":
        """Make room for a set's pixels in a folder; what other sets left there and no process uses is removed.

        Raises:
            ValueError: the folder cannot be made, or the disk or the budget is too small.
        """
        from importlib.metadata import version

        # What decodes gives the same pixels as long as it is the same.
        decoders = [version("simplejpeg"), version("pillow")]
        facts = json.dumps([_FORMAT, shards.manifest.identity, shards.num_samples, decoders])
        path = folder / f"{short_digest(facts.encode())}.pixels"
        cache = cls(path=path, num_samples=shards.num_samples, budget_bytes=budget_bytes)
        if cache.table_end >= budget_bytes:
            raise ValueError(
                f"--data.cache-decoded may take {gib(budget_bytes)}, but its table of {shards.num_samples:,} samples "
                f"alone takes {gib(cache.table_end)}: raise it, or leave it out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob("*.pixels"):
                # Another user's stay.
                with suppress(PermissionError):
                    if other != path:
                        remove_unlocked(other)
            os.close(cache.open_shared())
            cache._refuse_small_disk()
        except OSError as error:
            raise ValueError(
                f"cannot keep decoded pixels in {folder} ({error.strerror}): name another folder with "
                "--data.cache-decoded-in"
            ) from None
        return cache

    @property
    def table_end(self) -> int:
        """Bytes before the first pixel."""
        return -(-(_USED_BYTES + self.num_samples * _ENTRY.itemsize) // _PAGE_BYTES) * _PAGE_BYTES

    def open_shared(self) -> int:
        """Open the file, made if need be, and lock it against removal. Returns its descriptor. Raises OSError."""
        return open_locked(self.path, holder=str(self.path), shared=True, wait=True)

    def _refuse_small_disk(self) -> None:
        disk, file = os.statvfs(self.path), self.path.stat()
        left = disk.f_bavail * disk.f_frsize + 512 * file.st_blocks
        if left < self.budget_bytes:
            raise ValueError(
                f"--data.cache-decoded may take {gib(self.budget_bytes)}, but {self.path.parent} has {gib(left)} for "
                "it: lower it, make room, or name another folder with --data.cache-decoded-in"
            )


class DecodedFile:
    """An open decoded cache, for one thread."""

    def __init__(self, cache: DecodedCache) -> None:
        self._cache = cache
        self._descriptor = cache.open_shared()
        self._buffer: Encoded = np.empty(0, dtype=np.uint8)
        self._may_grow = True

    def find(self, samples: Indices, records: Records) -> Records:
        """Return the entries of samples: (n,), with offset 0 where there are no pixels of the record's bytes."""
        entries = np.concatenate([self._entry(sample) for sample in samples.tolist()] or [np.zeros(0, dtype=_ENTRY)])
        entries["offset"][entries["encoded_crc32c"] != records["crc32c"]] = 0
        return entries

    def read(self, entry: np.void, record: np.void) -> Pixels | None:
        """Return the pixels of an entry, (H, W, 3), which the next call overwrites; None if they are not whole."""
        shape = _shape(record)
        num_bytes = math.prod(shape)
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes, dtype=np.uint8)
        pixels = self._buffer[:num_bytes]
        try:
            num_read = os.preadv(self._descriptor, [pixels.data], int(entry["offset"]))
        except OSError:
            return None
        is_whole = num_read == num_bytes and crc32c(pixels) == entry["crc32c"]
        return pixels.reshape(shape) if is_whole else None

    def keep(self, sample: int, record: np.void, pixels: Pixels) -> None:
        """Write a sample's pixels, unless they would not fit. A full disk ends it: what is there stays in use."""
        if not self._may_grow or pixels.shape != _shape(record):
            return
        content = np.ascontiguousarray(pixels).reshape(-1)
        try:
            offset = self._reserve(sample, len(content))
            if offset:
                entry = np.array([(offset, record["crc32c"], crc32c(content))], dtype=_ENTRY)
                _write(self._descriptor, content, offset)
                _write(self._descriptor, entry.view(np.uint8), self._place(sample))
        except OSError:
            self._may_grow = False

    def close(self) -> None:
        """Close the file, which others may remove then."""
        os.close(self._descriptor)

    def _reserve(self, sample: int, num_bytes: int) -> int:
        """Return where a sample's pixels have their place; 0: there is no room for them."""
        with _locked_alone(self._descriptor):
            used = max(self._cache.table_end, int.from_bytes(os.pread(self._descriptor, _USED_BYTES, 0), "little"))
            entry = self._entry(sample)
            offset = int(entry["offset"][0])
            # Reserved by a process that was killed, or damaged.
            if self._cache.table_end <= offset <= used - num_bytes:
                return offset
            if used + num_bytes > self._cache.budget_bytes:
                return 0
            # In this order: a process that is killed in between loses the place, and no two samples have the same.
            os.pwrite(self._descriptor, (used + num_bytes).to_bytes(_USED_BYTES, "little"), 0)
            entry[0] = (used, 0, 0)
            _write(self._descriptor, entry.view(np.uint8), self._place(sample))
            return used

    def _entry(self, sample: int) -> Records:
        read = os.pread(self._descriptor, _ENTRY.itemsize, self._place(sample))
        # The file ends where nothing was written behind.
        return np.frombuffer(read.ljust(_ENTRY.itemsize, b"\0"), dtype=_ENTRY).copy()

    def _place(self, sample: int) -> int:
        return _USED_BYTES + sample * _ENTRY.itemsize


class PendingDecoded:
    """Samples of which some are in a decoded cache, while the bytes of the others are on their way."""

    def __init__(self, reader: Reader, samples: Indices, kept: DecodedFile) -> None:
        self._reader = reader
        self._kept = kept
        self.samples = samples
        """(n,) dense sample numbers that were asked for."""
        self.records = reader.records(samples)
        """(n,) of shards.sets.record.RECORD."""
        self._entries = kept.find(samples, self.records)
        self._others = self._begin(self._entries["offset"] == 0)

    def each(self, decode: Callable[[Encoded], Pixels], *, skip: bool) -> Iterator[Good[Pixels]]:
        """Give one sample after the other as PendingSamples does, and keep what had to be decoded.

        A sample's pixels are overwritten by the next one's. Raises DamagedSampleError.
        """
        others = self._others.each(decode, skip=skip)
        for place, entry in enumerate(self._entries):
            if entry["offset"]:
                pixels = self._kept.read(entry, self.records[place])
                if pixels is not None:
                    record = self.records[place : place + 1]
                    yield Good(sample=int(self.samples[place]), record=record, image=pixels, replaced=None)
                    continue
                good = next(self._begin(slice(place, place + 1)).each(decode, skip=skip))
            else:
                good = next(others)
            self._kept.keep(good.sample, good.record[0], good.image)
            yield good

    def _begin(self, places: "slice | np.ndarray[tuple[int], np.dtype[np.bool_]]") -> PendingSamples:
        return PendingSamples(self._reader, self.samples[places], records=self.records[places])


@contextmanager
def _locked_alone(descriptor: int) -> Generator[None]:
    """Keep other processes from reserving places. Of the first bytes alone: the whole file is locked by its users."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX, _USED_BYTES)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, _USED_BYTES)


def _shape(record: np.void) -> tuple[int, int, int]:
    return int(record["height"]), int(record["width"]), 3


def _write(descriptor: int, content: Encoded, offset: int) -> None:
    """Write all bytes: where a disk is nearly full, a call writes some of them and the next one says so."""
    begin = 0
    while begin < len(content):
        begin += os.pwrite(descriptor, content.data[begin:], offset + begin)
