"""The index beside each shard, and a set of shards as its readers see it."""

import io
from enum import IntFlag
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray

from shards.sets.manifest import Manifest
from shards.sets.shard_file import LocalShardFile, ShardFile
from shards.storage.stores import is_url, split_sets

__all__ = ["INDEXED", "RECORD", "REFUSED", "SUFFIXES", "Flag", "ShardSet", "flag_name", "npy_header"]

RECORD = np.dtype(
    [
        ("position", "<u8"),  # planned position: the key in the tar
        ("offset", "<u8"),  # of the image's bytes inside the tar
        ("size", "<u4"),  # of the image in bytes
        ("width", "<u4"),  # pixels, as stored
        ("height", "<u4"),
        ("label", "<i4"),  # -1: none
        ("crc32c", "<u4"),  # of the image's bytes
        ("mean_rgb", "u1", (3,)),
        ("flags", "u1"),  # Flag
    ]
)
"""One sample of a shard; 40 bytes."""

SUFFIXES = (".tar", ".index.npy", ".sources.txt", ".idx")
"""The files of a shard, each after its stem."""


@lru_cache(maxsize=128)
def npy_header(num_records: int) -> bytes:
    """The bytes before the records in a .npy file of that many."""
    buffer = io.BytesIO()
    write_array_header_1_0(buffer, {"descr": dtype_to_descr(RECORD), "fortran_order": False, "shape": (num_records,)})
    return buffer.getvalue()


INDEXED = "indexed"
"""In a manifest's settings: others wrote the tars, and `make-shards index` described them."""


class Flag(IntFlag):
    """What a reader should know about a sample. Shards that `pack` wrote have only HAS_MEAN_RGB."""

    HAS_MEAN_RGB = 1
    NEEDS_ORIENTATION = 2
    """EXIF asks for a turn or a mirror."""
    NOT_BASELINE = 4
    """A progressive or otherwise unusual JPEG: decoders take a slower path."""
    NOT_RGB = 8
    """CMYK or another color space."""
    NOT_JPEG = 16
    DAMAGED = 32
    """Nothing could make sense of its header."""


REFUSED = Flag.NEEDS_ORIENTATION | Flag.NOT_RGB | Flag.NOT_JPEG | Flag.DAMAGED
"""Training would see such a sample sideways, in wrong colors or not at all: packing mends or rejects it."""


def flag_name(flag: Flag) -> str:
    """Name of one flag in tallies, such as `not jpeg`."""
    return (flag.name or "").lower().replace("_", " ")


class ShardSet:
    """A finished folder of shards.

    Args:
        path: folder that holds manifest.json.
        manifest: its content.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.shard_sizes: NDArray[np.int64] = np.array([s.num_samples for s in manifest.shards], dtype=np.int64)
        """(num_shards,) samples of each shard."""
        self._open_index = lru_cache(maxsize=128)(self._map_index)

    @classmethod
    def open(cls, path: str | Path) -> "ShardSet":
        """Open a folder that make-shards wrote, its address (shards.sets.remote), or a `.beton` (shards.sets.beton).

        Several with commas between them are one set (shards.sets.merged).

        Raises:
            ValueError: no such folder or file, packing has not finished, or another format version.
        """
        parts = split_sets(str(path))
        if len(parts) > 1:
            from shards.sets.merged import MergedShardSet

            return MergedShardSet([cls.open(part) for part in parts])
        if is_url(str(path)):
            from shards.sets.remote import RemoteShardSet

            return RemoteShardSet.open_url(str(path))
        if Path(path).suffix == ".beton":
            from shards.sets.beton import BetonSet

            return BetonSet.open(path)
        return cls(Path(path), Manifest.read(path))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (ShardSet, (self.path, self.manifest))

    def __repr__(self) -> str:
        return f"ShardSet({str(self.path)!r}, num_samples={self.num_samples}, num_shards={self.num_shards})"

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return self.manifest.num_samples

    @property
    def num_shards(self) -> int:
        """Shards in the set."""
        return len(self.manifest.shards)

    @property
    def max_bytes(self) -> int:
        """Largest image in bytes."""
        return self.manifest.max_bytes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty when nothing is labeled."""
        return self.manifest.class_names

    def part(self, shard: int) -> "tuple[ShardSet, int]":
        """Return the set that a shard is from, and its number there: not this one where several are one."""
        return self, shard

    def shard_path(self, shard: int) -> Path:
        """Path of a shard's tar."""
        return self.path / self.manifest.shards[shard].name

    def shard_name(self, shard: int) -> str:
        """Where a shard is, for messages."""
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

    def index(self, shard: int) -> NDArray[np.void]:
        """Records of a shard, (shard_sizes[shard],) of RECORD, memory-mapped read-only; the newest 128 stay mapped.

        Raises:
            ValueError: the index is absent, damaged, or not that of this manifest.
        """
        return self._open_index(shard)

    def _map_index(self, shard: int) -> NDArray[np.void]:
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
                f"{path} is no index of {entry.num_samples} samples: it is damaged or of another set; "
                f"`make-shards verify {self.path}` tells more"
            )
        if not entry.num_samples:
            return np.empty(0, dtype=RECORD)
        return np.memmap(path, dtype=RECORD, mode="r", offset=len(header))
