"""Cache of features on disk: a file per encoder, set, view, precision and layer, whole or absent, memory-mapped.

    CACHE/ENCODER-DATA/LAYER-REST.safetensors    values (N, ...) float32, labels (N,), index (N,); the key as metadata
    CACHE/sets/                                  class folders that were packed (room.py)

The ranks write their rows side by side into one file, which gets its name when all are done: no process ever holds
more than a batch. What was used least recently, a file or a set, makes room when the cache would grow beyond its limit.
"""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moco_fast.evaluation.features import Features
from moco_fast.evaluation.room import FEATURES_SUFFIX, make_room
from shards.ground.digests import short_digest
from shards.ground.files import appearing, aside_of, cache_folder
from shards.ground.locks import locked

__all__ = ["FeatureCache", "FeatureKey", "RowsFile", "default_folder"]

_FORMAT = 1


def default_folder() -> Path:
    """Return the user's own folder for features."""
    return cache_folder("features")


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Everything that decides what features are."""

    encoder: str
    """Digest of the encoder."""
    data: str
    """Identity of the set's samples (shards.sets.manifest)."""
    size: int
    """Height and width of the images in pixels."""
    crop: float
    """Side of the central square, as a share of the shorter side."""
    decoder: str
    """What decodes, and where: backends and devices differ by some levels."""
    precision: str
    """That the encoder computes in."""
    layer: str
    at_most: int | None = None
    """Samples, spread over the set; None: all."""

    def path(self, folder: Path) -> Path:
        """Return where the features are, below a cache's folder."""
        rest = short_digest(json.dumps(asdict(self) | {"format": _FORMAT}, sort_keys=True).encode())
        name = f"{self.layer.replace('/', '-')}-{rest}{FEATURES_SUFFIX}"
        return folder / f"{self.encoder[:16]}-{self.data[:16]}" / name

    def whole(self) -> Self:
        """Return the key of all samples."""
        return replace(self, at_most=None)

    @property
    def metadata(self) -> dict[str, str]:
        """Return what the file says about itself."""
        return {"key": json.dumps(asdict(self), sort_keys=True)}


class RowsFile:
    """A file of features that is being written, rows in any order, by several processes at once.

    The first rank makes it with all its rows; then every rank maps it.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._arrays: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(
                path, _DTYPES[entry["dtype"]], "r+", 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
            )
            for name, entry in header.items()
            if name != "__metadata__" and entry["shape"][0]
        }

    @staticmethod
    def make(path: Path, key: FeatureKey, *, num_rows: int, shape: tuple[int, ...]) -> None:
        """Make the file with room for all rows. Raises OSError: the disk is full."""
        tensors = {"values": ("F32", (num_rows, *shape)), "labels": ("I64", (num_rows,)), "index": ("I64", (num_rows,))}
        header: dict[str, Any] = {"__metadata__": key.metadata}
        end = 0
        for name, (dtype, size) in tensors.items():
            begin, end = end, end + int(np.prod(size, dtype=np.int64)) * _DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # A page of a mapped file for which the disk has no room would end the process with a signal.
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)

    def write(self, row: int, values: Tensor, labels: Tensor, index: Tensor) -> None:
        """Write rows from number `row` on."""
        for name, rows in (("values", values), ("labels", labels), ("index", index)):
            if len(rows):
                self._arrays[name][row : row + len(rows)] = rows.cpu().numpy()

    def close(self) -> None:
        """Hand all rows to the file system."""
        for array in self._arrays.values():
            assert isinstance(array, np.memmap)
            array.flush()
        self._arrays.clear()


_DTYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


class FeatureCache:
    """A folder of features.

    Args:
        folder: made if need be.
        limit_gib: size that it may grow to; None: four fifths of what the disk has left.
    """

    def __init__(self, folder: Path, *, limit_gib: float | None = None) -> None:
        self.folder = folder
        self._limit_gib = limit_gib

    def find(self, key: FeatureKey) -> Features | None:
        """Return features whose `values` are mapped from their file, or None where it is absent."""
        path = key.path(self.folder)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != key.metadata:
                    return None  # Two keys whose short digests are the same.
                found = {name: file.get_tensor(name) for name in ("values", "labels", "index")}
        except (SafetensorError, FileNotFoundError):
            return None  # Cut off, overwritten or removed by someone else: it is made again.
        with suppress(OSError):  # Another user's, or removed meanwhile: what is mapped stays.
            os.utime(path)
        return Features(**found)

    @contextmanager
    def held(self, keys: Sequence[FeatureKey]) -> Generator[None]:
        """Keep other processes from writing the same features; waits for those that do."""
        with ExitStack() as stack:
            # In one order everywhere, so that no two processes wait for each other.
            for path in sorted(key.path(self.folder) for key in keys):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = path.with_name(f".{path.name}.lock")
                stack.enter_context(locked(lock, holder=str(path), wait=True))
            yield

    @contextmanager
    def appearing(
        self, keys: Sequence[FeatureKey], *, num_rows: int, shapes: Sequence[tuple[int, ...]]
    ) -> Generator[None]:
        """Make the files of keys, to be filled by `RowsFile(aside(key))`; they get their names when the block ends.

        For the first rank, within `held`.
        """
        needed = sum(4 * num_rows * int(np.prod(shape)) + 16 * num_rows for shape in shapes)
        make_room(self.folder, needed, limit_gib=self._limit_gib)
        with ExitStack() as stack:
            for key, shape in zip(keys, shapes, strict=True):
                aside = stack.enter_context(appearing(key.path(self.folder), durable=True))
                RowsFile.make(aside, key, num_rows=num_rows, shape=shape)
            yield

    def aside(self, key: FeatureKey) -> Path:
        """Return where a file grows."""
        return aside_of(key.path(self.folder))
