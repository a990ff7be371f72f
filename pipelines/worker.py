"""One worker process of the torch backend: reads, decodes and augments runs of samples into shared memory.

Started as `python -m pipelines.worker DESCRIPTOR`; the descriptor is its end of a connection to the loader. It is told
what to do in tuples, and ends when the other end is gone.
"""

import mmap
import os
import signal
import sys
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.augment import ViewTable
from pipelines.config import ViewConfig
from pipelines.reader import DamagedSampleError, PendingBytes, Reader
from pipelines.samples import Draw
from shards import ShardSet

__all__ = ["Slot", "Task", "WorkerSpec", "main", "map_slot"]

Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to know once."""

    shards: ShardSet
    draw: Draw
    """Gives the views' tables from (epoch, samples, records)."""
    size: int
    """Height and width of a view."""
    views: tuple[ViewConfig | None, ...]
    """The recipe of each view."""
    exact: bool
    """Apply torchvision's operations one by one."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Shared memory for the views and labels of a batch."""

    path: str
    """Opens the memory in any process of this user."""
    number: int
    """Name of the slot."""
    capacity: int
    """Samples."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run of samples of a batch."""

    slot: Slot
    begin: int
    """Place of the first sample in the slot."""
    epoch: int
    samples: Indices
    """Dense sample numbers."""


class SlotArrays:
    """A slot's memory as arrays."""

    def __init__(self, memory: mmap.mmap, spec: WorkerSpec, capacity: int) -> None:
        shape = (len(spec.views), capacity, spec.size, spec.size, 3)
        self.labels: Indices = np.frombuffer(memory, dtype=np.int64, count=capacity)
        self.views: Pixels = np.frombuffer(memory, dtype=np.uint8, offset=8 * capacity, count=int(np.prod(shape)))
        self.views = self.views.reshape(shape)


def slot_bytes(spec: WorkerSpec, capacity: int) -> int:
    """Bytes of a slot for so many samples."""
    return capacity * (8 + len(spec.views) * spec.size * spec.size * 3)


def map_slot(slot: Slot, spec: WorkerSpec) -> SlotArrays:
    """Map a slot's memory into this process."""
    descriptor = os.open(slot.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return SlotArrays(mmap.mmap(descriptor, slot_bytes(spec, slot.capacity)), spec, slot.capacity)
    finally:
        os.close(descriptor)


def main(descriptor: int) -> None:
    """Work until the loader is gone."""
    # Ctrl-C reaches the whole group of processes: the loader decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    connection: Connection[Any, Any] = Connection(descriptor)
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        _work(connection, connection.recv())


def _work(connection: "Connection[Any, Any]", spec: WorkerSpec) -> None:
    reader = Reader(spec.shards, num_threads=1)
    slots: dict[int, SlotArrays] = {}
    waiting: deque[_Begun] = deque()
    try:
        while True:
            # The bytes of the next task are read while this one is worked on.
            while not waiting or (len(waiting) < 2 and connection.poll()):
                waiting.append(_Begun(connection.recv(), reader))
            begun = waiting.popleft()
            slot = begun.task.slot
            if slot.number not in slots:
                try:
                    slots[slot.number] = map_slot(slot, spec)
                except FileNotFoundError:
                    # The loader's process is gone, and its memory with it.
                    return
            try:
                _fill(begun, spec, slots[slot.number])
            except Exception as error:
                connection.send((slot.number, _portable(error)))
            else:
                connection.send((slot.number, len(begun.task.samples)))
    finally:
        reader.close()


class _Begun:
    """A task whose bytes are on their way, or the error that kept them from being asked for."""

    def __init__(self, task: Task, reader: Reader) -> None:
        self.task = task
        self.error: Exception | None = None
        self.pending: PendingBytes
        self.records: npt.NDArray[np.void]
        try:
            self.records = reader.records(task.samples)
            self.pending = reader.submit(task.samples, self.records)
        except Exception as error:
            self.error = error


def _fill(begun: _Begun, spec: WorkerSpec, arrays: SlotArrays) -> None:
    from pipelines.pixels import decode, render, render_as_torchvision

    if begun.error is not None:
        raise begun.error
    task = begun.task
    tables: tuple[ViewTable, ...] = spec.draw(task.epoch, task.samples, begun.records)
    places = slice(task.begin, task.begin + len(task.samples))
    arrays.labels[places] = begun.records["label"]
    for row, encoded in enumerate(begun.pending.result()):
        try:
            image = decode(encoded)
        except ValueError as error:
            raise DamagedSampleError(_name(spec.shards, begun, row, error)) from error
        for out, table, view in zip(arrays.views[:, task.begin + row], tables, spec.views, strict=True):
            if spec.exact and view is not None:
                render_as_torchvision(image, table, row, out, grayscale_first=view.grayscale_first)
            else:
                render(image, table, row, out)


def _name(shards: ShardSet, begun: _Begun, row: int, error: Exception) -> str:
    sample, position = int(begun.task.samples[row]), int(begun.records["position"][row])
    shard = int(np.searchsorted(np.cumsum(shards.shard_sizes), sample, side="right"))
    return f"{shards.shard_path(shard)}: sample {sample} (key {position}) {error}"


def _portable(error: Exception) -> Exception:
    """Give an error that survives the way through the connection, with its traceback as a note."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
