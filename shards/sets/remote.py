"""Set of shards in a bucket or on a web server, read in place."""

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, Self

import numpy as np

from shards.ground.arrays import Encoded, Records
from shards.ground.digests import digest as digest_of
from shards.sets.base import BaseSet, RemoteSet, SetKind, ShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest
from shards.sets.record import RECORD, npy_header
from shards.sets.shard_file import ShardFile
from shards.storage.stores import check_url, open_folder

__all__ = ["RemoteShardSet"]


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

    @classmethod
    def open(cls, url: str) -> Self:
        """Fetch a manifest, and nothing else.

        Raises:
            ValueError: there is no finished set, or the store does not answer.
        """
        check_url(url)
        url = url.rstrip("/")
        return cls(url, *Manifest.fetch(url))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (type(self), (self.url, self.manifest, self.digest))

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
            raise ValueError(
                f"{self.url}/{name} belongs to what {MANIFEST_NAME} lists but is absent: restore it, or run "
                f"`make-shards verify {self.url}`"
            ) from None

    def index(self, shard: int) -> Records:
        """Return the records of a shard, (shard_sizes[shard],) of RECORD; the newest 128 are kept.

        Raises:
            ValueError: the index is absent, damaged, or not that of this manifest, or the store does not answer.
        """
        return self._fetch_index(shard)

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
