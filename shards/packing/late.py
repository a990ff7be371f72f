"""Shards of parts that fell silent, which other parts write when they are done with their own. Pure functions."""

from collections.abc import Mapping, Sequence
from statistics import median

from shards.packing.plan import ShardTask
from shards.packing.records import Finished

__all__ = ["late_tasks"]

_LATE, _LATE_S = 4, 60.0
"""How many times as long as a shard takes, and how long at least, a part may finish none."""


def late_tasks(
    tasks: Sequence[ShardTask], records: Mapping[ShardTask, Finished], num_parts: int, *, now_s: float
) -> list[ShardTask]:
    """Return the missing shards of parts that have begun and then finished none for long: their last ones first.

    A part is preempted, or its machine hangs or is slow. Where it is at work after all, both write the same bytes, and
    are unlikely to meet at one shard, since it goes the other way.

    Args:
        tasks: all shards of the plan; part i of n has every n-th from the i-th on.
        records: of those that are finished.
        num_parts: of the packing.
        now_s: seconds since 1970.
    """
    spans = [record.span for record in records.values() if record.span is not None]
    if not spans:
        return []
    limit_s = max(_LATE_S, _LATE * median(end - begin for begin, end in spans))
    late: list[ShardTask] = []
    for number in range(num_parts):
        share = tasks[number::num_parts]
        ends = [record.span[1] for task in share if (record := records.get(task)) and record.span is not None]
        if ends and now_s - max(ends) > limit_s:
            late += [task for task in reversed(share) if task not in records]
    return late
