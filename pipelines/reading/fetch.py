"""Steps of a rank, while the shards of the coming ones are fetched: the order is known, and so is what comes next.

A second walk through the steps runs ahead of the first as far as the rank's share of the cache reaches. What it has
passed and the first has not is held; fetching is in that order, by as many threads as `Pace` says. Nothing here waits:
a reader that needs a shard which is not there yet waits for it, or fetches it, in `CachedShardSet.open_shard`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import numpy as np

from pipelines.plan.steps import Steps
from pipelines.reading.cache import CachedShardSet, CacheFolder
from pipelines.reading.pace import Pace
from shards import ShardSet
from shards.ground.arrays import Indices
from shards.sets.base import RemoteSet, ShardCopy

__all__ = ["STEPS_KEPT", "FetchedSteps", "cached"]


_LOG = logging.getLogger(__name__)

STEPS_KEPT = 4
"""Steps whose shards are held after they were taken: their samples may not be read yet."""


_PATIENCE_S = 5


def cached(shards: ShardSet, folder: CacheFolder) -> ShardSet:
    """Return the same set with local copies of what is remote."""

    def copied(part: RemoteSet) -> ShardSet:
        return CachedShardSet(part.url, part.manifest, part.digest, folder)

    return shards.with_copies(copied)


class FetchedSteps(Iterator[tuple[int, Indices]]):
    """Gives the steps as they are. Where shards are cached, fetches and holds those of the coming steps."""

    def __init__(self, shards: ShardSet, steps: Steps) -> None:
        self._steps = iter(steps)
        self._ahead = _Ahead(shards, steps) if shards.copied_bytes.any() else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Indices]:
        """Give the next step: (epoch, dense sample numbers)."""
        self.advance()
        return next(self._steps)

    def advance(self) -> None:
        """Note that a step has begun, for a caller that gets the steps elsewhere."""
        if self._ahead is not None:
            self._ahead.advance()

    def close(self) -> None:
        """Stop fetching, and hold nothing any more."""
        if self._ahead is not None:
            self._ahead.close()


class _Ahead:
    def __init__(self, shards: ShardSet, steps: Steps) -> None:
        self._shards = shards
        self._steps = iter(steps)
        self._most_ahead = steps.num_steps
        self._ends: Indices = np.cumsum(shards.shard_sizes)
        self._bytes = shards.copied_bytes
        # All are in one folder.
        self._holder = self._copy(int(self._bytes.argmax())).open_holder()
        self._last_use: dict[int, int] = {}
        self._wanted: deque[int] = deque()
        self._num_taken = 0
        self._changed = threading.Condition()
        self._is_closed = threading.Event()
        self._pace = Pace(*self._holder.fetchers)
        self._threads: list[threading.Thread] = []
        self._start(self._walk)
        for number in range(self._pace.num_fetchers):
            self._start(partial(self._fetch, number))

    def advance(self) -> None:
        with self._changed:
            self._num_taken += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed.set()
            self._changed.notify_all()
        deadline = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._holder.close()

    def _copy(self, shard: int) -> ShardCopy:
        copy = self._shards.copy_of(shard)
        assert copy is not None
        return copy

    def _walk(self) -> None:
        num_remote = int((self._bytes > 0).sum())
        for step, (_, samples) in enumerate(self._steps):
            shards = np.unique(np.searchsorted(self._ends, samples, side="right"))
            needed = [shard for shard in shards.tolist() if self._bytes[shard]]
            self._admit(step, needed)
            # All are held, and stay so.
            if self._is_closed.is_set() or len(self._last_use) == num_remote:
                return

    def _admit(self, step: int, needed: list[int]) -> None:
        """Hold the shards of a step, once there is room for them in this rank's share or the step is due.

        Not more than an epoch ahead: where the whole set has room, there is nothing to gain by walking on.
        """
        with self._changed:
            while not self._is_closed.is_set():
                self._release(needed)
                new = [shard for shard in needed if shard not in self._last_use]
                num_bytes = int(self._bytes[[*self._last_use, *new]].sum())
                is_near = step <= self._num_taken + self._most_ahead
                if is_near and (not new or num_bytes <= self._holder.share_bytes or step <= self._num_taken):
                    break
                self._changed.wait()
            else:
                return
            self._last_use.update(dict.fromkeys(needed, step))
            if new:
                self._hold()
                self._wanted.extend(new)
                self._changed.notify_all()

    def _release(self, needed: list[int]) -> None:
        """Let go of shards whose last known use is over."""
        oldest = self._num_taken - STEPS_KEPT
        over = [shard for shard, step in self._last_use.items() if step < oldest and shard not in needed]
        for shard in over:
            del self._last_use[shard]
        if over:
            self._hold()

    def _hold(self) -> None:
        self._holder.hold({self._copy(shard).name for shard in self._last_use})

    def _start(self, target: Callable[[], None]) -> None:
        # A daemon: a store that does not answer must not keep the process from ending.
        thread = threading.Thread(target=target, name="fetch-shards", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fetch(self, number: int) -> None:
        def is_needed() -> bool:
            return bool(self._wanted) and number < self._pace.num_fetchers

        while True:
            with self._changed:
                if not self._wanted:
                    self._pace.rest()
                self._changed.wait_for(lambda: self._is_closed.is_set() or is_needed())
                if self._is_closed.is_set():
                    return
                shard = self._wanted.popleft()
            try:
                if self._copy(shard).fetch(cancel=self._is_closed):
                    self._note(shard)
            except (ValueError, OSError) as error:
                # The reader that needs it tries again, and fails if that fails.
                _LOG.warning("not fetched ahead: %s", error)

    def _note(self, shard: int) -> None:
        """Note that a shard was fetched, and have more fetchers where that is of use."""
        with self._changed:
            before = self._pace.num_fetchers
            self._pace.note(int(self._bytes[shard]), time.monotonic())
            if self._is_closed.is_set():
                return
            # Threads that were too many before wait, and are not started again.
            for number in range(max(before, len(self._threads) - 1), self._pace.num_fetchers):
                self._start(partial(self._fetch, number))
