"""Hours that a run took, times its ranks, over all of its starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moco_fast.report.record import RunRecord

__all__ = ["RankHours", "name_of_hours", "rank_hours", "rank_hours_at"]


@dataclass(frozen=True, kw_only=True)
class RankHours:
    """Hours of a run, each counted once per rank."""

    total: float
    """From every start until that start was last seen alive: evaluation, saving and lost steps included."""
    training: float
    """Of the steps that the run consists of."""
    num_starts: int


def name_of_hours(records: Sequence[RunRecord]) -> str:
    """Return what hours times ranks are called: not every rank may have a GPU."""
    return "GPU hours" if all(record.environment.get("cuda") for record in records) else "rank hours"


def rank_hours(record: RunRecord) -> RankHours | None:
    """Count a run's hours; None: its folder does not say how many ranks it had, or when.

    A folder of a version that did not note its starts tells the training time alone.
    """
    world, time_s = record.environment.get("world_size"), record.last["time_s"]
    if world is None or not time_s:
        return None
    starts = record.starts
    training = rank_hours_at(record, time_s)
    total = training
    if starts:
        ends = [*(start["before_seen"] for start in starts[1:]), record.seen]
        pairs = zip(starts, ends, strict=True)
        total = sum(each["world_size"] * max((end or each["at"]) - each["at"], 0) for each, end in pairs) / 3600
    return RankHours(
        # Not below what was trained: clocks of machines differ.
        total=max(total, training),
        training=training,
        num_starts=max(len(starts), 1),
    )


def rank_hours_at(record: RunRecord, time_s: float) -> float:
    """Return the hours of training, times ranks, until a run's own clock shows `time_s`; starts may differ in ranks."""
    starts: list[dict[str, Any]] = record.starts or [{"time_s": 0.0, "world_size": record.environment["world_size"]}]
    # A version that did not note its starts may have begun the run.
    bounds = [0.0, *(start["time_s"] for start in starts[1:]), float("inf")]
    spans = zip(starts, pairwise(bounds), strict=True)
    return sum(each["world_size"] * max(min(time_s, end) - begin, 0) for each, (begin, end) in spans) / 3600
