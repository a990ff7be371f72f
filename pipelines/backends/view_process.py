"""Worker process of the torch backend: reads, decodes and augments runs of samples into shared memory.

A child (shards.ground.child) whose spec is a WorkerSpec; it sends a TaskReport for every ViewTask.
"""

import mmap
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pipelines.backends.layout import num_view_bytes, split_views
from pipelines.plan.augment import ViewTable
from pipelines.plan.draw import Draw
from pipelines.reading.decoded import DecodedCache, DecodedFile, PendingDecoded
from pipelines.reading.reader import Reader
from pipelines.reading.samples import PendingSamples
from shards import ShardSet
from shards.ground.arrays import Indices, Pixels
from shards.ground.errors import portable
from shards.ground.memory import map_shared

__all__ = [
    "FINISHED_TOGETHER",
    "SlotArrays",
    "TaskReport",
    "ViewSlot",
    "ViewTask",
    "WorkerSpec",
    "main",
    "map_slot",
    "slot_bytes",
]


# Samples whose views are blurred and recolored in one go, after all of them are decoded and cropped: in turns, the two
# push each other's code out of the caches of the core (7% of the time of two MoCo v2 views). More samples gain 1%, but
# their views (0.3 MB per sample) would outgrow a core's share of the last cache on many machines.
FINISHED_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to know once."""

    shards: ShardSet
    shards_in_use: int
    """Shards that are read side by side, at most."""
    draw: Draw
    """Gives the views' tables from (epoch, samples, records)."""
    sizes: tuple[int, ...]
    """Height and width of each view."""
    skip: bool
    """Replace samples that are damaged, instead of failing."""
    decoded: DecodedCache | None = None
    """Where decoded pixels are kept."""


@dataclass(frozen=True, kw_only=True)
class ViewSlot:
    """Shared memory for the views and labels of a batch."""

    path: str
    """Opens the memory in any process of this user."""
    number: int
    """Name of the slot."""
    capacity: int
    """Samples."""


@dataclass(frozen=True, kw_only=True)
class ViewTask:
    """A run of samples of a batch."""

    slot: ViewSlot
    begin: int
    """Place of the first sample in the slot."""
    epoch: int
    samples: Indices
    """Dense sample numbers."""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What became of a task."""

    slot: int
    """Number of the slot."""
    num_samples: int = 0
    """Samples whose views are in the slot now."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another took the place of."""


class SlotArrays:
    """A slot's memory as arrays."""

    def __init__(self, memory: mmap.mmap, spec: WorkerSpec, capacity: int) -> None:
        self.samples: Indices = np.frombuffer(memory, dtype=np.int64, count=capacity)
        self.labels: Indices = np.frombuffer(memory, dtype=np.int64, offset=8 * capacity, count=capacity)
        self.pixels: Pixels = np.frombuffer(memory, dtype=np.uint8, offset=16 * capacity)
        self.views = split_views(self.pixels, spec.sizes, capacity)


def slot_bytes(spec: WorkerSpec, capacity: int) -> int:
    """Bytes of a slot for so many samples."""
    return 16 * capacity + num_view_bytes(spec.sizes, capacity)


def map_slot(slot: ViewSlot, spec: WorkerSpec) -> SlotArrays:
    """Map a slot's memory into this process."""
    return SlotArrays(map_shared(slot.path, slot_bytes(spec, slot.capacity)), spec, slot.capacity)


def main(connection: "Connection[Any, Any]", spec: WorkerSpec) -> None:
    """Work until the loader is gone."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    reader = Reader(spec.shards, num_threads=1, in_use=spec.shards_in_use)
    kept = None if spec.decoded is None else DecodedFile(spec.decoded)
    slots: dict[int, SlotArrays] = {}
    waiting: deque[_BegunViews] = deque()
    try:
        while True:
            # The bytes of the next task are read while this one is worked on.
            while not waiting or (len(waiting) < 2 and connection.poll()):
                waiting.append(_BegunViews(connection.recv(), reader, kept))
            begun = waiting.popleft()
            slot = begun.task.slot
            if slot.number not in slots:
                try:
                    slots[slot.number] = map_slot(slot, spec)
                except FileNotFoundError:
                    # The loader's process is gone, and its memory with it.
                    return
            try:
                replaced = _fill(begun, spec, slots[slot.number])
            except Exception as error:
                connection.send(portable(error, "in a worker process"))
            else:
                connection.send(TaskReport(slot=slot.number, num_samples=len(begun.task.samples), replaced=replaced))
    finally:
        reader.close()


class _BegunViews:
    """A task whose bytes are on their way, or the error that kept them from being asked for."""

    def __init__(self, task: ViewTask, reader: Reader, kept: DecodedFile | None = None) -> None:
        self.task = task
        self.pending: PendingSamples | PendingDecoded | Exception
        try:
            samples = task.samples
            self.pending = PendingDecoded(reader, samples, kept) if kept else PendingSamples(reader, samples)
        except Exception as error:
            self.pending = error


def _fill(begun: _BegunViews, spec: WorkerSpec, arrays: SlotArrays) -> tuple[str, ...]:
    """Do a task; give what was wrong with samples that were replaced."""
    from pipelines.backends.pixels import crop, decode, finish

    if isinstance(begun.pending, Exception):
        raise begun.pending
    task, pending = begun.task, begun.pending
    drawn: tuple[ViewTable, ...] = spec.draw(task.epoch, pending.samples, pending.records)
    replaced: list[str] = []
    unfinished: list[tuple[ViewTable, int, Pixels]] = []
    # A sample's crops are taken before the next one is decoded: its pixels are still in the CPU's cache.
    for row, good in enumerate(pending.each(decode, skip=spec.skip)):
        place, tables, row_of_table = task.begin + row, drawn, row
        arrays.samples[place], arrays.labels[place] = good.sample, good.record["label"][0]
        if good.replaced is not None:
            replaced.append(good.replaced)
            tables, row_of_table = spec.draw(task.epoch, np.array([good.sample]), good.record), 0
        for view, table in zip(arrays.views, tables, strict=True):
            crop(good.image, table, row_of_table, view[place])
            unfinished.append((table, row_of_table, view[place]))
        if (row + 1) % FINISHED_TOGETHER == 0 or row + 1 == len(task.samples):
            for table, row_of_view, out in unfinished:
                finish(table, row_of_view, out)
            unfinished.clear()
    return tuple(replaced)
