"""Set of shards in a folder on this machine."""

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from shards.ground.arrays import Records
from shards.sets.base import BaseSet, SetKind
from shards.sets.manifest import Manifest
from shards.sets.record import RECORD, npy_header
from shards.sets.shard_file import LocalShardFile, ShardFile

__all__ = ["LocalShardSet"]


class LocalShardSet(BaseSet):
    """A finished folder of shards.

    Args:
        path: folder that holds manifest.json.
        manifest: its content.
    """

    kind: ClassVar[SetKind] = "local"

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(str(path), manifest)
        self.path = path
        self._open_index = lru_cache(maxsize=128)(self._map_index)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a folder that make-shards wrote.

        Raises:
            ValueError: no such folder, packing has not finished there, or its format is of another version.
        """
        return cls(Path(path), Manifest.read(path))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (type(self), (self.path, self.manifest))

    def shard_path(self, shard: int) -> Path:
        """Return the path of a shard's tar."""
        return self.path / self.manifest.shards.name(shard)

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard's tar, for messages."""
        return str(self.shard_path(shard))

    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard's tar. Raises FileNotFoundError."""
        path = self.shard_path(shard)
        try:
            return LocalShardFile(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is listed in manifest.json but absent: restore it, or run `make-shards verify {path.parent}`"
            ) from None

    def read_beside(self, name: str) -> bytes:
        """Return a file beside the shards."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {self.path / name} ({error.strerror}): restore it, or pack again") from error

    def index(self, shard: int) -> Records:
        """Return the records of a shard, (shard_sizes[shard],) of RECORD, memory-mapped; the newest 128 stay mapped.

        Raises:
            ValueError: the index is absent, damaged, or not that of this manifest.
        """
        return self._open_index(shard)

    def _map_index(self, shard: int) -> Records:
        entry = self.manifest.shards[shard]
        header = npy_header(entry.num_samples)
        path = self.path / f"{entry.stem}.index.npy"
        size = len(header) + entry.num_samples * RECORD.itemsize
        try:
            with path.open("rb") as file:
                is_whole = file.read(len(header)) == header and file.seek(0, 2) == size
        except OSError as error:
            raise ValueError(f"cannot read the index {path} ({error.strerror}): restore it, or pack again") from error
        if not is_whole:
            raise ValueError(
                f"{path} is not an index of {entry.num_samples} samples: it is damaged or of another set; "
                f"`make-shards verify {self.path}` says more"
            )
        if not entry.num_samples:
            return np.empty(0, dtype=RECORD)
        return np.memmap(path, dtype=RECORD, mode="r", offset=len(header))
