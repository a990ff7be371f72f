"""Steps of a rank, while the shards of the coming ones are fetched: the order is known, and so is what comes next.

A second walk through the steps runs ahead of the first as far as the rank's share of the cache reaches. What it has
passed and the first has not is held; fetching is in that order, by a few threads. Nothing here waits: a reader
that needs a shard which is not there yet waits for it, or fetches it, in `CachedShardSet.open_shard`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Self

import numpy as np

from pipelines.plan.steps import Steps
from pipelines.reading.cache import CachedShardSet, CacheFolder
from shards import ShardSet
from shards.ground.arrays import Indices
from shards.sets.base import RemoteSet, ShardCopy

__all__ = ["STEPS_KEPT", "FetchedSteps", "cached"]


_LOG = logging.getLogger(__name__)

STEPS_KEPT = 4
"""Steps whose shards are held after they were taken: their samples may not be read yet."""


_FETCHERS = 4
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
        # Daemons: a store that does not answer must not keep the process from ending.
        targets = [self._walk, *[self._fetch] * _FETCHERS]
        self._threads = [threading.Thread(target=target, name="fetch-shards", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

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

    def _fetch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed.is_set() or self._wanted)
                if self._is_closed.is_set():
                    return
                shard = self._wanted.popleft()
            try:
                self._copy(shard).fetch(cancel=self._is_closed)
            except (ValueError, OSError) as error:
                # The reader that needs it tries again, and fails if that fails.
                _LOG.warning("not fetched ahead: %s", error)
