"""Encoded batches, read ahead in a separate process.

A process, because threads that read need the interpreter's lock at every sample, and beside a busy interpreter they
wait for it; here the lock is needed a few times per batch. Shared memory, because a batch is megabytes.
"""

import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from pipelines.plan.augment import ViewTable
from pipelines.reading.read_process import Content, Filled, ReadingSpec
from shards.ground.arrays import Encoded, Indices
from shards.ground.child import start_children
from shards.ground.memory import lend, map_shared

__all__ = ["EncodedBatch", "ReadAhead"]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A rank's share of a step before decoding."""

    epoch: int
    samples: Indices
    """(B,) dense sample numbers."""
    labels: Indices
    """(B,), -1 where there is none."""
    keys: Indices
    """(B,) keys of the samples in their shards."""
    encoded: list[Encoded]
    """B encoded images, in memory that is used again once all of them are dropped."""
    tables: tuple[ViewTable, ...]
    """What is done to each view."""
    replaced: tuple[str, ...]
    """What was wrong with each sample that another took the place of."""


class ReadAhead(Iterator[EncodedBatch]):
    """The batches of `spec.steps`. Iterated by one thread; `interrupt` may come from another."""

    def __init__(self, spec: ReadingSpec) -> None:
        self._slot_bytes = spec.slot_bytes
        self._slots: dict[int, Encoded] = {}
        self._free: deque[int] = deque()
        self._is_over = False
        [self._child] = start_children("pipelines.reading.read_process", spec, what="reader process")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EncodedBatch:
        """Wait for the next batch.

        Raises:
            StopIteration: that was the last one.
            WorkerDiedError: the process is gone.
            ChannelClosed: interrupted.
            Exception: what went wrong in the process.
        """
        filled = self._receive()
        if filled.slot not in self._slots:
            try:
                memory = map_shared(filled.path, self._slot_bytes)
            except FileNotFoundError:
                raise self._child.gone() from None
            self._slots[filled.slot] = np.frombuffer(memory, dtype=np.uint8)
        self._child.send(tuple(self._free.popleft() for _ in range(len(self._free))))
        slot = self._slots[filled.slot]
        content: Content = pickle.loads(slot[filled.begin : filled.end].data)  # noqa: S301 - from our own process
        lent = lend(slot, partial(self._free.append, filled.slot))
        ends = content.begins + content.sizes
        return EncodedBatch(
            epoch=content.epoch,
            samples=content.samples,
            labels=content.labels,
            keys=content.keys,
            encoded=[lent[begin:end] for begin, end in zip(content.begins.tolist(), ends.tolist(), strict=True)],
            tables=content.tables,
            replaced=content.replaced,
        )

    @property
    def pid(self) -> int:
        """The process that reads."""
        return self._child.process.pid

    def interrupt(self) -> None:
        """End the process, and let threads that wait for a batch raise ChannelClosed."""
        self._child.interrupt()

    def close(self) -> None:
        """End the process. No thread may still be waiting for a batch."""
        self._child.close()
        self._slots.clear()

    def _receive(self) -> Filled:
        if self._is_over:
            raise StopIteration
        message: Filled | None = self._child.receive()
        if message is None:
            self._is_over = True
            raise StopIteration
        return message
