"""Encoded batches, read ahead by a process of their own.

A process, because threads that read need the interpreter's lock at every sample, and beside a busy interpreter they
wait for it; here the lock is needed a few times a batch. Shared memory, because a batch is megabytes.
"""

import pickle
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import numpy.typing as npt

from pipelines.plan.augment import ViewTable
from pipelines.reading.ahead_process import PACKET_BYTES, Content, Filled, ReadingSpec, SpecPlace
from shards.ground.channel import ChannelClosed
from shards.ground.child import end_child, explain_death, start_child
from shards.ground.memory import create_shared, lend, map_shared, shared_path

__all__ = ["EncodedBatch", "ReadAhead"]

Indices = npt.NDArray[np.int64]
Encoded = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A rank's share of a step before decoding."""

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
        self._is_interrupted = False
        self._is_over = False
        pickled = np.frombuffer(pickle.dumps(spec), dtype=np.uint8)
        # Too large for a packet where the shards are many; freed with the file object, at the end.
        self._spec_file = open(create_shared("moco-fast-reading", len(pickled)), "wb")  # noqa: SIM115, PTH123
        self._spec_file.write(pickled.data)
        self._spec_file.flush()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start_child("pipelines.reading.ahead_process", theirs.fileno())
        place = SpecPlace(path=shared_path(self._spec_file.fileno()), num_bytes=len(pickled))
        self._connection.send(pickle.dumps(place))

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
        try:
            if filled.slot not in self._slots:
                memory = map_shared(filled.path, self._slot_bytes)
                self._slots[filled.slot] = np.frombuffer(memory, dtype=np.uint8)
            free = tuple(self._free.popleft() for _ in range(len(self._free)))
            self._connection.send(pickle.dumps(free))
        except OSError:
            raise self._died() from None
        slot = self._slots[filled.slot]
        content: Content = pickle.loads(slot[filled.begin : filled.end].data)  # noqa: S301 - from our own process
        lent = lend(slot, partial(self._free.append, filled.slot))
        ends = content.begins + content.sizes
        return EncodedBatch(
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
        return self._process.pid

    def interrupt(self) -> None:
        """End the process, and let whoever waits for a batch raise ChannelClosed."""
        self._is_interrupted = True
        with suppress(OSError):  # the process is gone already
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the process. Nobody may wait for a batch any more."""
        self._connection.close()
        end_child(self._process)
        self._spec_file.close()
        self._slots.clear()

    def _receive(self) -> Filled:
        if self._is_over:
            raise StopIteration
        try:
            packet = self._connection.recv(PACKET_BYTES)
        except OSError:
            packet = b""
        if not packet:
            raise self._died()
        message: Filled | Exception | None = pickle.loads(packet)  # noqa: S301
        if message is None:
            self._is_over = True
            raise StopIteration
        if isinstance(message, Exception):
            raise message
        return message

    def _died(self) -> Exception:
        return ChannelClosed() if self._is_interrupted else explain_death(self._process, "reader process")
