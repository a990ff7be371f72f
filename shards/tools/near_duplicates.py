"""Near-duplicates in a set of shards: groups of images whose difference hashes are almost the same."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.ground.arrays import Indices
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.images.libraries import decode_jpeg, shrink
from shards.sets.base import ShardSet

__all__ = ["HashesOf", "near_duplicates", "near_pairs"]

_SIZE = (9, 8)
_FLAT = 2.0
_MOST_BITS = 3
# A band of 16 bits is the same by chance for 15 of a million images.
_WINDOW = 16


@dataclass(frozen=True)
class HashesOf:
    """Hashes the images of a shard, for a worker process."""

    shards: ShardSet

    def __call__(self, number: int, tick: Tick) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return the hashes (N,), and which of them mean something: not those of flat, tiny or damaged images."""
        file, records = self.shards.open_shard(number), self.shards.index(number)
        hashes, is_known = np.zeros(len(records), dtype=np.uint64), np.zeros(len(records), dtype=np.bool_)
        for row, record in enumerate(records):
            data = np.empty(int(record["size"]), dtype=np.uint8)
            found = _hash(data[: file.read_into(data, int(record["offset"]))].tobytes())
            if found is not None:
                hashes[row], is_known[row] = found, True
            tick(1, len(data))
        return hashes, is_known


def _hash(data: bytes) -> int | None:
    """Return 64 bits: whether each pixel of an image of 9 x 8 is brighter than its left neighbor ("dHash")."""
    try:
        pixels = decode_jpeg(data, gray=True, reduce=8, strict=False)
        if pixels.shape[1] < 4 * _SIZE[0] or pixels.shape[0] < 4 * _SIZE[1]:
            pixels = decode_jpeg(data, gray=True, strict=False)
        if pixels.shape[1] < _SIZE[0] or pixels.shape[0] < _SIZE[1]:
            return None
        small = shrink(np.ascontiguousarray(pixels), _SIZE)[:, :, 0]
    except ValueError:
        return None
    if small.std() < _FLAT:
        return None
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return pairs of rows whose hashes differ in at most 3 of 64 bits, (P, 2), the smaller row first.

    Two such hashes agree in one of four bands of 16 bits. For each band the hashes are sorted with that band first, and
    compared with the next 16: all pairs are found where no more images than that share a band.
    """
    pairs: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)]
    for turn in (0, 16, 32, 48):
        turned = hashes << np.uint64(turn) | hashes >> np.uint64((64 - turn) % 64)
        order = np.argsort(turned, kind="stable")
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            a, b = order[:-step], order[step:]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= _MOST_BITS
            pairs.append(np.sort(np.stack((a[near], b[near]), axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def near_duplicates(shards: ShardSet, *, workers: int, progress: ProgressBars) -> list[Indices]:
    """Return groups of near-duplicates, each the dense sample numbers of at least two images, the largest first."""
    with progress.stage("comparing images", unit=" images", total=shards.num_samples) as tick:
        found = dict(run_tasks(HashesOf(shards), range(shards.num_shards), workers=workers, tick=tick))
    parts = [found[number] for number in range(shards.num_shards)]
    if not parts:
        return []
    hashes = np.concatenate([part[0] for part in parts])
    rows = np.flatnonzero(np.concatenate([part[1] for part in parts]))
    groups = [rows[group] for group in _groups(near_pairs(hashes[rows]).tolist())]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def _groups(pairs: list[list[int]]) -> list[list[int]]:
    """Return the rows that pairs join, directly or through others, sorted within each group."""
    group_of: dict[int, list[int]] = {}
    for a, b in pairs:
        small, large = sorted((group_of.get(a, [a]), group_of.get(b, [b])), key=len)
        if small is not large:
            large += small
            group_of |= dict.fromkeys((*small, *large), large)
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]
