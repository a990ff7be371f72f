"""Contents of all inputs: which split each belongs to, and which inputs are duplicates.

Digests lie in the target, a file for some rows of the listing. Whoever packs to it takes part, and reads what no one
has read or is reading: each input is read once, and a process that is killed loses the file that it was at.
"""

import time
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
from shards.packing.partitions import spans
from shards.packing.plan import PackPlan, cached_plan
from shards.storage.claims import Claims
from shards.storage.target import WORK_NAME, Target

__all__ = ["DIGEST", "FILE_ROWS", "digest_contents", "first_of_each", "read_digests", "split_of"]

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
"""xxh3_128 of an input's bytes; zeros where it cannot be read."""

FILE_ROWS = 1 << 16
_ROWS_PER_TASK = 256
_POLL_S = 1.0
Span = tuple[int, int]


@dataclass(frozen=True)
class _DigestRows:
    """Reads some rows of a listing."""

    place: str
    spools: Path

    def __call__(self, span: Span, tick: Tick) -> NDArray[np.void]:
        plan = cached_plan(self.place, self.spools)
        digests = np.zeros(span[1] - span[0], dtype=DIGEST)
        with closing(read_inputs(plan, plan.rows(*span))) as inputs:
            for i, item in enumerate(inputs):
                # What cannot be read comes up again when packing, and is recorded then.
                if isinstance(item.data, bytes):
                    value = digest_number(item.data)
                    digests[i] = (value >> 64, value & 0xFFFFFFFFFFFFFFFF)
                tick(1, len(item.data) if isinstance(item.data, bytes) else 0)
        return digests


def _file_of(listed: PackPlan, start: int) -> str:
    return f"{WORK_NAME}/digests-{listed.name.removeprefix('listed-')}/{start:012d}.bin"


def digest_contents(
    listed: PackPlan, target: Target, claims: Claims, *, workers: int, first: float, progress: ProgressBars
) -> None:
    """See to it that the digest of every listed input is in the target, together with whoever else does.

    Args:
        listed: the listing.
        target: for the digests.
        claims: of the target.
        workers: processes of this one.
        first: from 0 to 1: where in the listing to begin, so that several do not come to the same file.
        progress: shows how far it is.
    """
    num_rows = listed.num_positions
    all_files = {span: _file_of(listed, span[0]) for span in spans(num_rows, FILE_ROWS)}
    with progress.stage("comparing contents", unit=" inputs", total=num_rows) as tick:
        sizes = target.sizes()
        missing = [span for span, name in all_files.items() if name not in sizes]
        tick(num_rows - sum(stop - start for start, stop in missing))
        at = int(first * len(missing))
        missing = missing[at:] + missing[:at]
        job = _DigestRows(listed.place, target.work / "spools")
        while missing:
            left = [
                span for span in missing if not _digest_file(job, span, all_files[span], target, claims, workers, tick)
            ]
            if len(left) == len(missing):
                # Others are at all that is left.
                time.sleep(_POLL_S)
            missing = left


def _digest_file(
    job: _DigestRows, span: Span, name: str, target: Target, claims: Claims, workers: int, tick: Tick
) -> bool:
    """Write the digests of some rows, unless someone else does. Returns whether they are there."""
    if target.has(name):
        tick(span[1] - span[0])
        return True
    with claims.hold(f"digests-{span[0]:012d}") as is_ours:
        if not is_ours:
            return False
        # The last holder may have finished since.
        if target.has(name):
            tick(span[1] - span[0])
            return True
        start, stop = span
        digests = np.zeros(stop - start, dtype=DIGEST)
        tasks = [(start + begin, start + end) for begin, end in spans(stop - start, _ROWS_PER_TASK)]
        for (begin, end), part in run_tasks(job, tasks, workers=workers, tick=tick):
            digests[begin - start : end - start] = part
        target.put_first(name, digests.tobytes())
        return True


def read_digests(listed: PackPlan, target: Target, start: int, stop: int) -> NDArray[np.void]:
    """Return the digests of some rows of the listing, all of which have been read, (stop - start,) of DIGEST."""
    first = start // FILE_ROWS * FILE_ROWS
    files = [target.get(_file_of(listed, at)) or b"" for at in range(first, stop, FILE_ROWS)]
    return np.frombuffer(b"".join(files), dtype=DIGEST)[start - first : stop - first]


def first_of_each(digests: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the first row with the same content for each row, (N,) int64; for an unreadable row, the row itself."""
    unreadable = (digests["high"] == 0) & (digests["low"] == 0)
    order = np.lexsort((digests["low"], digests["high"]))
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
