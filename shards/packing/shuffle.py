"""Shuffle of a packing: a key for each row, by which rows are sorted. No library's release can change it."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["rows_at", "shuffle_keys"]

_CHUNK_ROWS = 1 << 20
_BIN_BITS = 16


def shuffle_keys(rows: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return the keys of some rows; no two rows have the same.

    They are splitmix64 of the row's number (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators"), with the seed hashed into where the counter starts. That is a bijection of 64 bits: keys are spread
    evenly, so rows can be sorted in partitions by the upper bits of their keys.

    Args:
        rows: (N,) numbers.
        seed: of the shuffle.

    Returns:
        (N,) uint64.
    """
    start = _splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return _splitmix64(rows + start)


def rows_at(positions: NDArray[np.int64], num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return which rows are at some positions of a shuffle, in memory for them and 2^-16 of the rows for each.

    Args:
        positions: (P,) within range(num_rows).
        num_rows: that are shuffled.
        seed: of the shuffle.

    Returns:
        (P,) int64.
    """
    counts = np.zeros(1 << _BIN_BITS, dtype=np.int64)
    for _, _, bins in _chunks(num_rows, seed):
        counts += np.bincount(bins, minlength=len(counts))
    ends = np.cumsum(counts)
    wanted = np.searchsorted(ends, positions, side="right")
    is_wanted = np.zeros(len(counts), dtype=bool)
    is_wanted[wanted] = True
    kept = [np.stack([rows, keys])[:, is_wanted[bins]] for rows, keys, bins in _chunks(num_rows, seed)]
    rows, keys = np.concatenate([np.empty((2, 0), dtype=np.uint64), *kept], axis=1)
    ordered = rows[np.argsort(keys)].astype(np.int64)
    # Before a wanted bin lie all kept rows of the wanted bins before it.
    kept_ends = np.cumsum(np.where(is_wanted, counts, 0))
    return ordered[positions - (ends - kept_ends)[wanted]]


def _chunks(num_rows: int, seed: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]]:
    """Return rows, their keys, and the upper bits of these, some rows at a time."""
    for start in range(0, num_rows, _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, num_rows), dtype=np.uint64)
        keys = shuffle_keys(rows, seed)
        yield rows, keys, (keys >> np.uint64(64 - _BIN_BITS)).astype(np.int64)


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
