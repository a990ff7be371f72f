"""Several batches decoded at once, and handed over one by one: where a batch is too small to keep a decoder busy.

A GPU needs 8 to 10 ms for the views of 32 images and 27 ms for those of 256 (benchmarks/results/2026-11-26-H200.md).
Batches that are decoded together are always the same ones, counted from the beginning of their epoch: which decoder an
image gets may depend on its neighbors, and a resumed run must see the views that it would have seen.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np

from pipelines.backends.base import Job, Made, Stream
from pipelines.plan.steps import Steps
from shards.ground.arrays import Indices

__all__ = ["SplitStream", "StepsTogether", "start_together"]


@dataclass(frozen=True, kw_only=True)
class StepsTogether:
    """Steps in groups, each of which counts as one step; a group ends with its epoch."""

    steps: Steps
    """Begin where a group does."""
    at_once: int
    """Steps of a group."""

    @property
    def num_steps(self) -> int:
        """Groups until the steps end, or until all samples come again."""
        return -(-self.steps.num_steps // self.at_once)

    @property
    def shards_in_use(self) -> int:
        """Shards that are read side by side, at most."""
        return self.steps.shards_in_use

    def __iter__(self) -> Iterator[tuple[int, Indices]]:
        """Give (epoch, dense sample numbers) of each group."""
        for epoch, of_epoch in groupby(self.steps, key=lambda step: step[0]):
            while group := [samples for _, samples in islice(of_epoch, self.at_once)]:
                yield epoch, np.concatenate(group)


class SplitStream:
    """Stream of batches from one of groups. What was replaced in a group is told with the first batch of it.

    Args:
        stream: of groups.
        size: samples of a batch; the last of a group may be short.
        drop: batches of the first group that are not wanted.
    """

    def __init__(self, stream: Stream, *, size: int, drop: int) -> None:
        self._stream = stream
        self._size = size
        self._drop = drop
        self._ready: deque[Made] = deque()

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        while not self._ready:
            group = self._stream.get()
            self._ready.extend(islice(self._split(group), self._drop, None))
            self._drop = 0
            if self._ready:
                self._ready[0] = replace(self._ready[0], replaced=group.replaced)
        return self._ready.popleft()

    def close(self) -> None:
        """End all threads and processes; what is ready is dropped."""
        self._ready.clear()
        self._stream.close()

    def _split(self, group: Made) -> Iterator[Made]:
        for begin in range(0, len(group.samples), self._size):
            rows = slice(begin, begin + self._size)
            views = tuple(view[rows] for view in group.views)
            yield Made(samples=group.samples[rows], labels=group.labels[rows], views=views)


def start_together(
    start: Callable[[Job, Steps], Stream], job: Job, steps: Steps, *, at_once: int, drop: int = 0
) -> Stream:
    """Start a backend on steps, of which it makes several at once.

    Args:
        start: starts the backend.
        job: what it is to do; its largest batch is that of one step.
        steps: that begin where a group does.
        at_once: steps of a group.
        drop: steps of the first group that are not wanted.
    """
    if at_once == 1:
        return start(job, steps)
    groups = StepsTogether(steps=steps, at_once=at_once)
    stream = start(replace(job, max_batch=at_once * job.max_batch), groups)
    return SplitStream(stream, size=job.max_batch, drop=drop)
