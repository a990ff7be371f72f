"""Contents of all inputs: which split each belongs to, and which inputs are duplicates."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.ground.digests import digest_number
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.packing.inputs import read_inputs
from shards.packing.plan import cached_plan

__all__ = ["DIGEST", "digest_contents", "first_of_each", "split_of"]

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
"""xxh3_128 of an input's bytes; zeros where it cannot be read."""

_ROWS_PER_TASK = 256


@dataclass(frozen=True)
class _DigestRows:
    """Reads some rows of a plan."""

    folder: Path

    def __call__(self, start: int, tick: Tick) -> NDArray[np.void]:
        plan = cached_plan(self.folder)
        digests = np.zeros(min(_ROWS_PER_TASK, plan.num_inputs - start), dtype=DIGEST)
        with closing(read_inputs(plan, plan.listed(start, start + len(digests)))) as inputs:
            for i, item in enumerate(inputs):
                # What cannot be read comes up again when packing, and is recorded then.
                if isinstance(item.data, bytes):
                    value = digest_number(item.data)
                    digests[i] = (value >> 64, value & 0xFFFFFFFFFFFFFFFF)
                tick(1, len(item.data) if isinstance(item.data, bytes) else 0)
        return digests


def digest_contents(folder: Path, num_rows: int, *, workers: int, progress: ProgressBars) -> NDArray[np.void]:
    """Return the digest of every listed input, (num_rows,) of DIGEST."""
    digests = np.zeros(num_rows, dtype=DIGEST)
    with progress.stage("comparing contents", unit=" inputs", total=num_rows) as tick:
        tasks = range(0, num_rows, _ROWS_PER_TASK)
        for start, part in run_tasks(_DigestRows(folder), tasks, workers=workers, tick=tick):
            digests[start : start + len(part)] = part
    return digests


def first_of_each(digests: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the first row with the same content for each row, (N,) int64; for an unreadable row, the row itself."""
    unreadable = (digests["high"] == 0) & (digests["low"] == 0)
    order = np.lexsort((np.arange(len(digests)), digests["low"], digests["high"]))
    ordered = digests[order]
    is_first = np.ones(len(digests), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    is_first |= unreadable[order]
    firsts = np.empty(len(digests), dtype=np.int64)
    firsts[order] = order[is_first][np.cumsum(is_first) - 1]
    return firsts


def split_of(digests: NDArray[np.void], shares: Sequence[float]) -> NDArray[np.int64]:
    """Return the number of the split of each row, (N,) int64: decided by its content alone, so that it never changes.

    Args:
        digests: (N,) of DIGEST.
        shares: of the splits after the first, which takes the rest. Unreadable rows go to the first.
    """
    # 53 bits: what a float holds exactly.
    points = (digests["high"] >> np.uint64(11)).astype(np.float64) / (1 << 53)
    bounds = np.cumsum([0.0, *shares])
    splits = np.searchsorted(bounds, points, side="right")
    splits[splits > len(shares)] = 0
    splits[(digests["high"] == 0) & (digests["low"] == 0)] = 0
    return splits.astype(np.int64)
