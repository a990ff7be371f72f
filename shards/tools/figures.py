"""Figures of a set of shards: what `inspect` prints and `summary` draws."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.ground.arrays import Indices
from shards.sets.base import ShardSet

__all__ = ["Histogram", "bytes_of", "class_counts", "columns_of", "evenly_spread", "histograms", "place_of"]

_MOST = 1 << 17
_PIXELS = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, _MOST)
_KILOBYTES = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 1 << 23)
_RATIOS = (0, 0.25, 0.5, 0.75, 0.95, 1.05, 4 / 3 + 0.01, 2, 4, _MOST)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values lie between some edges."""

    title: str
    median: float
    bins: tuple[tuple[str, int], ...]
    """Range in words and number of samples, without empty ranges."""


def columns_of(shards: ShardSet) -> dict[str, Indices]:
    """Return width, height, size, flags and label of every sample, (num_samples,) int64 each."""
    names = ("width", "height", "size", "flags", "label")
    parts = [shards.index(i) for i in range(shards.num_shards)]
    return {name: np.concatenate([part[name].astype(np.int64) for part in parts]) for name in names}


def histograms(columns: dict[str, Indices]) -> list[Histogram]:
    """Return the distributions of shorter side, size in bytes and shape, given `columns_of` at least one sample."""
    width, height = columns["width"].astype(np.float64), columns["height"].astype(np.float64)
    ratio = np.divide(width, height, out=np.ones_like(width), where=height > 0)
    return [
        _histogram("shorter side in pixels", np.minimum(width, height), _PIXELS),
        _histogram("kilobytes", columns["size"] / 1000, _KILOBYTES),
        _histogram("width / height", ratio, _RATIOS),
    ]


def _histogram(title: str, values: NDArray[np.float64], edges: Sequence[float]) -> Histogram:
    counts, _ = np.histogram(values, bins=edges)
    bins = tuple(
        (f"{low:g} to {high:g}" if high < _MOST else f"{low:g} and more", count)
        for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False)
        if count
    )
    return Histogram(title=title, median=float(np.median(values)), bins=bins)


def class_counts(shards: ShardSet, labels: Indices) -> tuple[Indices, int]:
    """Return the samples of each class, (num_classes,), and how many samples have no class."""
    if shards.manifest.has_label_sets:
        sets = np.concatenate([shards.label_sets(shard) for shard in range(shards.num_shards)])
        return (sets == 1).sum(axis=0), int((~(sets == 1).any(axis=1)).sum())
    counts = np.bincount(labels[labels >= 0], minlength=len(shards.class_names))
    return counts, len(labels) - int(counts.sum())


def evenly_spread(shards: ShardSet, num: int) -> list[int]:
    """Return at most `num` dense sample numbers, evenly spread over a set that has samples."""
    return np.unique(np.linspace(0, shards.num_samples - 1, num).astype(np.int64)).tolist()


def place_of(shards: ShardSet, sample: int) -> tuple[int, int]:
    """Return the shard of a dense sample number, and the row in it."""
    starts: list[int] = (np.cumsum(shards.shard_sizes) - shards.shard_sizes).tolist()
    shard = bisect_right(starts, sample) - 1
    return shard, sample - starts[shard]


def bytes_of(shards: ShardSet, sample: int) -> bytes:
    """Return the image of a dense sample number as it is stored. Raises OSError or ValueError: it cannot be read."""
    shard, row = place_of(shards, sample)
    record = shards.index(shard)[row]
    data = np.empty(int(record["size"]), dtype=np.uint8)
    return data[: shards.open_shard(shard).read_into(data, int(record["offset"]))].tobytes()
