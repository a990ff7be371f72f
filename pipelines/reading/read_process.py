"""Process that reads ahead: order, parameters and encoded bytes of batch after batch, into shared memory.

A child (shards.ground.child) whose spec is a ReadingSpec. It makes batches, at most `ahead` that the other side has not
taken; each message from there says that one was taken, and which slots are free again. Its own messages are a Filled
for each batch, then None, or an error.
"""

import mmap
import os
import pickle
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.plan.augment import ViewTable
from pipelines.plan.draw import Draw
from pipelines.plan.steps import Steps
from pipelines.reading.fetch import FetchedSteps
from pipelines.reading.reader import Reader
from pipelines.reading.samples import PendingSamples, as_read
from shards import ShardSet
from shards.ground.arrays import Indices
from shards.ground.errors import portable
from shards.ground.memory import create_shared, shared_path

__all__ = ["Content", "Filled", "ReadingSpec", "main"]


_DRAWN_AT_ONCE = 512
"""Samples whose parameters are drawn in one call: numpy takes 23 us for each view of a batch of 32 by itself, 4 us for
sixteen such batches together, both views."""


@dataclass(frozen=True, kw_only=True)
class ReadingSpec:
    """What to read."""

    shards: ShardSet
    steps: Steps
    draw: Draw
    """Gives the views' tables from (epoch, samples, records)."""
    max_batch: int
    """Samples in the largest batch."""
    ahead: int
    """Batches begun before they are asked for."""
    num_threads: int
    skip: bool
    """Replace samples that are damaged, instead of failing."""

    @property
    def slot_bytes(self) -> int:
        """Bytes that no batch exceeds, even if all its samples are replaced. Memory not written to costs nothing."""
        return self.max_batch * (2 * self.shards.max_bytes + 4096) + (1 << 20)


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Where a batch is: a slot of shared memory with the images, and behind them the pickled Content."""

    slot: int
    path: str
    """Opens the slot's memory."""
    begin: int
    """Of the content, in bytes from the slot's begin."""
    end: int


@dataclass(frozen=True, kw_only=True)
class Content:
    """A batch but for its images."""

    epoch: int
    samples: Indices
    labels: Indices
    keys: Indices
    """(B,) positions in the plan."""
    begins: Indices
    """(B,) first byte of each image in the slot."""
    sizes: Indices
    tables: tuple[ViewTable, ...]
    replaced: tuple[str, ...]


class _ReadSlot:
    def __init__(self, number: int, num_bytes: int) -> None:
        self.number = number
        self.descriptor = create_shared("moco-fast-encoded", num_bytes)
        self.array = np.frombuffer(mmap.mmap(self.descriptor, num_bytes), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    epoch: int
    samples: Indices
    records: npt.NDArray[np.void]
    tables: tuple[ViewTable, ...]


@dataclass(frozen=True, kw_only=True)
class _BegunReads:
    drawn: _Drawn
    pending: PendingSamples
    slot: _ReadSlot


def main(connection: "Connection[Any, Any]", spec: ReadingSpec) -> None:
    """Read until the other side is gone."""
    taken: SimpleQueue[tuple[int, ...]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, taken), name="listen", daemon=True).start()
    _Reading(spec, connection, taken).run()


def _listen(connection: "Connection[Any, Any]", taken: "SimpleQueue[tuple[int, ...]]") -> None:
    """Pass on what the other side says, and end this process at once when it is gone, whatever is being waited for."""
    with suppress(EOFError, OSError):
        while True:
            taken.put(connection.recv())
    os._exit(0)


class _Reading:
    def __init__(
        self, spec: ReadingSpec, connection: "Connection[Any, Any]", taken: "SimpleQueue[tuple[int, ...]]"
    ) -> None:
        self._spec = spec
        self._connection = connection
        self._taken = taken
        self._reader = Reader(spec.shards, num_threads=spec.num_threads, in_use=spec.steps.shards_in_use)
        self._fetched = FetchedSteps(spec.shards, spec.steps)
        self._drawn = self._draw_ahead()
        self._may_begin = spec.ahead
        self._slots: list[_ReadSlot] = []
        self._free: deque[_ReadSlot] = deque()

    def run(self) -> None:
        """Make all batches, then wait to be ended: the other side may still open slots."""
        waiting: deque[_BegunReads | Exception] = deque()
        is_over = False
        while True:
            while self._may_begin and not is_over:
                begun = self._begin()
                is_over = not isinstance(begun, _BegunReads)
                if begun is not None:
                    waiting.append(begun)
                self._may_begin -= 1
            if waiting:
                self._hand_over(waiting.popleft())
            elif is_over:
                self._send(None)
                while True:
                    self._taken.get()
            self._take_back(block=not waiting and not is_over and not self._may_begin)

    def _begin(self) -> "_BegunReads | Exception | None":
        """Start the next batch; None after the last, or what went wrong, after which there is nothing more."""
        try:
            self._fetched.advance()
            drawn = next(self._drawn, None)
            if drawn is None:
                return None
            slot = self._free.popleft() if self._free else self._new_slot()
            pending = PendingSamples(self._reader, drawn.samples, records=drawn.records, into=slot.array)
            return _BegunReads(drawn=drawn, pending=pending, slot=slot)
        except Exception as error:
            return error

    def _draw_ahead(self) -> Iterator[_Drawn]:
        """Give the steps with their parameters, drawn for several steps in one call."""
        steps = iter(self._spec.steps)
        while group := list(islice(steps, -(-_DRAWN_AT_ONCE // self._spec.max_batch))):
            try:
                yield from self._draw(group)
            except Exception:
                # An index that cannot be read is an error when its own step is due, after the batches before it.
                for step in group:
                    yield from self._draw([step])

    def _draw(self, group: list[tuple[int, Indices]]) -> list[_Drawn]:
        samples = np.concatenate([of_step for _, of_step in group])
        records = self._reader.records(samples)
        sizes = [len(of_step) for _, of_step in group]
        tables = self._spec.draw(np.repeat([epoch for epoch, _ in group], sizes), samples, records)
        ends = np.cumsum(sizes).tolist()
        places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return [
            _Drawn(epoch=epoch, samples=of_step, records=records[rows], tables=tuple(t.rows(rows) for t in tables))
            for (epoch, of_step), rows in zip(group, places, strict=True)
        ]

    def _new_slot(self) -> _ReadSlot:
        self._slots.append(_ReadSlot(len(self._slots), self._spec.slot_bytes))
        return self._slots[-1]

    def _hand_over(self, begun: "_BegunReads | Exception") -> None:
        try:
            if isinstance(begun, Exception):
                raise begun
            self._send(self._finish(begun))
        except Exception as error:
            self._send(portable(error, "in the reader process"))

    def _finish(self, begun: _BegunReads) -> Filled:
        drawn, pending, slot = begun.drawn, begun.pending, begun.slot
        taken = pending.take(as_read, skip=self._spec.skip)
        sizes = np.array([len(image) for image in taken.images], dtype=np.int64)
        asked = pending.sizes
        end = int(asked.sum())
        begins = np.cumsum(asked) - asked
        # What took the place of damaged samples was read elsewhere.
        others = np.flatnonzero(taken.samples != pending.samples).tolist()
        for place in others:
            begins[place], begin, end = end, end, end + int(sizes[place])
            slot.array[begin:end] = taken.images[place]
        tables = self._spec.draw(drawn.epoch, taken.samples, taken.records) if others else drawn.tables
        content = Content(
            epoch=drawn.epoch,
            samples=taken.samples,
            labels=taken.records["label"].astype(np.int64),
            keys=taken.records["position"].astype(np.int64),
            begins=begins,
            sizes=sizes,
            tables=tables,
            replaced=taken.replaced,
        )
        pickled = np.frombuffer(pickle.dumps(content, protocol=5), dtype=np.uint8)
        slot.array[end : end + len(pickled)] = pickled
        return Filled(slot=slot.number, path=shared_path(slot.descriptor), begin=end, end=end + len(pickled))

    def _take_back(self, *, block: bool) -> None:
        """Note what the other side has taken and given back."""
        with suppress(Empty):
            while True:
                free = self._taken.get(block=block)
                block = False
                self._may_begin += 1
                self._free.extend(self._slots[number] for number in free)

    def _send(self, message: Filled | Exception | None) -> None:
        try:
            self._connection.send(message)
        except OSError:
            # The other side is gone: `_listen` is about to do the same.
            os._exit(0)
