"""Set of shards in a bucket or on a web server, read in place."""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

import numpy as np

from shards.ground.arrays import Encoded, Indices, Records
from shards.ground.digests import digest as digest_of
from shards.ground.threads import mapped
from shards.sets.base import BaseSet, RemoteSet, SetKind, ShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest
from shards.sets.record import RECORD, npy_header
from shards.sets.shard_file import ShardFile
from shards.storage.stores import check_url, open_folder

__all__ = ["RANGE_THREADS", "RemoteShardSet"]

RANGE_THREADS = 64
"""Requests for single records or samples that are under way at a time: each takes tens of milliseconds."""

# Records that are not wanted but fetched with their neighbors: 10 KB take less time than another request.
_NEAR = 256
_MOST_KNOWN = 1 << 20


class _KnownRecords(NamedTuple):
    """Records that were fetched."""

    samples: Indices
    """(n,) dense sample numbers, rising."""
    records: Records
    """(n,)"""

    def without(self, samples: Indices) -> Indices:
        """Return those samples, rising, whose records are not here."""
        place = np.minimum(np.searchsorted(self.samples, samples), max(len(self.samples) - 1, 0))
        return np.unique(samples[self.samples[place] != samples] if len(self.samples) else samples)

    def with_more(self, samples: Indices, records: Records) -> "_KnownRecords":
        """Add those of other samples."""
        numbers = np.concatenate([self.samples, samples])
        order = np.argsort(numbers, kind="stable")
        return _KnownRecords(numbers[order], np.concatenate([self.records, records])[order])


_NONE_KNOWN = _KnownRecords(np.empty(0, dtype=np.int64), np.empty(0, dtype=RECORD))


class RemoteShardSet(BaseSet):
    """A finished set that is not on this machine. Indexes are fetched when asked for, samples by ranges.

    Args:
        url: address of the folder that holds manifest.json.
        manifest: its content.
        digest: of the bytes that decide what it is, in hex.
    """

    kind: ClassVar[SetKind] = "remote"

    def __init__(self, url: str, manifest: Manifest, digest: str) -> None:
        super().__init__(url, manifest)
        self.url = url
        self.digest = digest
        self._fetch_index = lru_cache(maxsize=128)(self._read_index)
        self._known = _NONE_KNOWN

    @classmethod
    def open(cls, url: str) -> Self:
        """Fetch a manifest, and nothing else.

        Raises:
            ValueError: there is no finished set, or the store does not answer.
        """
        check_url(url)
        url = url.rstrip("/")
        return cls(url, *Manifest.fetch(url))

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.url, self.manifest, self.digest), {"_known": self._known})

    def with_copies(self, copy: Callable[[RemoteSet], ShardSet]) -> ShardSet:
        """Return what `copy` gives for this set."""
        return copy(self)

    def shard_name(self, shard: int) -> str:
        """Return the address of a shard's tar."""
        return f"{self.url}/{self.manifest.shards.name(shard)}"

    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard's tar for reading by ranges."""
        return _RangeFile(self, shard)

    def read_beside(self, name: str) -> bytes:
        """Fetch a file beside the shards."""
        try:
            return open_folder(self.url).read(name)
        except FileNotFoundError:
            raise self._absent(name) from None

    def index(self, shard: int) -> Records:
        """Return the records of a shard, (shard_sizes[shard],) of RECORD; the newest 128 are kept.

        Raises:
            ValueError: the index is absent, damaged, or not that of this manifest, or the store does not answer.
        """
        return self._fetch_index(shard)

    @property
    def reads_ranges(self) -> bool:
        """Return True: shards stay where they are."""
        return True

    def records_of(self, samples: Indices) -> Records:
        """Return the records of samples by their dense numbers, (n,) of RECORD, each fetched once.

        Records that are near each other are one request, and many requests are under way at a time. What arrives is
        kept for the next call and for other processes, up to a million records: an evaluation asks for the same again.
        It has no digest of its own; but the image that a record points to is checked against the record's crc32c.

        Raises:
            ValueError: the index is absent, or the store does not answer.
        """
        known = self._known
        missing = known.without(samples)
        if len(missing) and len(known.samples) + len(missing) > _MOST_KNOWN:
            known, missing = _NONE_KNOWN, np.unique(samples)
        if len(missing):
            self._known = known = known.with_more(missing, self._fetch_records(missing))
        return known.records[np.searchsorted(known.samples, samples)]

    def _fetch_records(self, samples: Indices) -> Records:
        """Fetch records of samples whose numbers rise."""
        ends = np.cumsum(self.shard_sizes)
        shard = np.searchsorted(ends, samples, side="right")
        local = samples - (ends - self.shard_sizes)[shard]
        apart = np.flatnonzero((np.diff(shard) != 0) | (np.diff(local) > _NEAR)) + 1
        runs = list(pairwise([0, *apart.tolist(), len(samples)]))
        found = np.empty(len(samples), dtype=RECORD)

        def fetch(run: tuple[int, int]) -> Records:
            begin, end = run
            return self._read_records(int(shard[begin]), local[begin:end])

        for (begin, end), records in mapped(fetch, runs, threads=RANGE_THREADS, ahead=4 * RANGE_THREADS):
            found[begin:end] = records
        return found

    def _read_records(self, shard: int, rows: Indices) -> Records:
        first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        name = f"{self.manifest.shards.stem(shard)}.index.npy"
        begin = len(npy_header(int(self.shard_sizes[shard]))) + first * RECORD.itemsize
        try:
            data = open_folder(self.url).read_range(name, begin, count * RECORD.itemsize)
        except FileNotFoundError:
            raise self._absent(name) from None
        return np.frombuffer(data, dtype=RECORD)[rows - first]

    def _absent(self, name: str) -> ValueError:
        return ValueError(
            f"{self.url}/{name} belongs to what {MANIFEST_NAME} lists but is absent: restore it, or run "
            f"`make-shards verify {self.url}`"
        )

    def index_bytes(self, shard: int) -> bytes:
        """Fetch the index of a shard and check it. Raises ValueError."""
        entry = self.manifest.shards[shard]
        name = f"{entry.stem}.index.npy"
        data = self.read_beside(name)
        promised = entry.digests.get(".index.npy", "")
        header = npy_header(entry.num_samples)
        if (promised and digest_of(data) != promised) or (
            not data.startswith(header) or len(data) != len(header) + entry.num_samples * RECORD.itemsize
        ):
            raise ValueError(
                f"{self.url}/{name} is not an index of {entry.num_samples} samples: it is damaged or of another set; "
                f"`make-shards verify {self.url}` says more"
            )
        return data

    def _read_index(self, shard: int) -> Records:
        data = self.index_bytes(shard)
        return np.frombuffer(data, dtype=RECORD, offset=len(npy_header(int(self.shard_sizes[shard]))))


class _RangeFile:
    """A shard that stays where it is."""

    is_deleted = False

    def __init__(self, shards: RemoteShardSet, shard: int) -> None:
        self.name = shards.shard_name(shard)
        self._url = shards.url
        self._object = shards.manifest.shards.name(shard)

    def read_into(self, buffer: Encoded, offset: int) -> int:
        """Fetch a range. Raises FileNotFoundError, or PackError where the store does not answer."""
        buffer[:] = np.frombuffer(
            open_folder(self._url).read_range(self._object, offset, len(buffer)) if len(buffer) else b"", dtype=np.uint8
        )
        return len(buffer)
