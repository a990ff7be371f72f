"""Torch backend: worker processes that write views into a ring of shared memory.

Processes, because threads starve beside an interpreter that is busy; shared memory, because a batch of views is tens of
megabytes. A slot of the ring is handed to the consumer as it is, and comes back when its tensors are dropped.
"""

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait

import numpy as np
import numpy.typing as npt
import torch

from pipelines.backends.base import Job, Made
from pipelines.backends.layout import split_views
from pipelines.backends.view_process import SlotArrays, TaskReport, ViewSlot, ViewTask, WorkerSpec, map_slot, slot_bytes
from pipelines.plan.steps import Steps
from pipelines.reading.fetch import FetchedSteps
from shards.ground.arrays import Indices
from shards.ground.channel import Channel, ChannelClosed
from shards.ground.child import Child, WorkerDiedError, start_children
from shards.ground.memory import create_shared, lend, shared_path

__all__ = ["WorkerDiedError", "WorkerViews"]


# Tasks a worker holds: one in work, one whose bytes are being read.
_QUEUED = 2
_LARGEST_TASK = 64


@dataclass(kw_only=True, eq=False)
class _Unfinished:
    """A batch in the making."""

    samples: Indices
    slot: "_RingSlot"
    missing: int = field(init=False)
    replaced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.missing = len(self.samples)


class WorkerViews:
    """Views of the samples of `steps`, made ahead of need by worker processes.

    Args:
        job: what to do.
        steps: (epoch, dense sample numbers) of each batch; consumed in the background.
    """

    def __init__(self, job: Job, steps: Steps) -> None:
        self._steps = FetchedSteps(job.shards, steps)
        self._device = job.device
        spec = WorkerSpec(
            shards=job.shards,
            shards_in_use=steps.shards_in_use,
            draw=job.draw,
            sizes=tuple(view.size for view in job.views),
            skip=job.skip,
            decoded=job.decoded,
        )
        max_batch, num_workers = job.max_batch, job.num_threads
        self._ahead = job.prefetch + 1
        self._task_size = max(1, min(_LARGEST_TASK, -(-max_batch // (2 * num_workers))))
        self._ring = _Ring(spec, max_batch)
        self._tasks: deque[ViewTask] = deque()
        self._batches: deque[_Unfinished] = deque()
        self._num_started = 0
        self._num_taken = 0
        self._out: Channel[Made] = Channel(self._ahead + 1)
        children = start_children("pipelines.backends.view_process", spec, count=num_workers, what="worker process")
        self._workers = [_Worker(child) for child in children]
        self._thread = threading.Thread(target=self._run, name="worker-views", daemon=True)
        self._thread.start()

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        batch = self._out.get()
        self._num_taken += 1
        self._ring.bell.ring()
        return batch

    def close(self) -> None:
        """End the thread and the processes; what is ready is dropped."""
        self._out.close()
        self._ring.bell.ring()
        self._thread.join()
        self._steps.close()
        for worker in self._workers:
            worker.child.connection.close()
        for worker in self._workers:
            worker.child.close()
        self._ring.close()

    def _run(self) -> None:
        try:
            exhausted = False
            while not self._out.closed:
                while not exhausted and self._num_started - self._num_taken < self._ahead:
                    exhausted = not self._start_batch()
                if exhausted and not self._batches:
                    self._out.fail(StopIteration())
                    return
                self._hand_out()
                self._collect()
                while self._batches and self._batches[0].missing == 0:
                    self._hand_over(self._batches.popleft())
        except ChannelClosed:
            pass
        except BaseException as error:
            self._out.fail(error)

    def _start_batch(self) -> bool:
        following = next(self._steps, None)
        if following is None:
            return False
        epoch, samples = following
        batch = _Unfinished(samples=samples, slot=self._ring.take())
        self._batches.append(batch)
        self._num_started += 1
        for begin in range(0, len(samples), self._task_size):
            part = samples[begin : begin + self._task_size]
            self._tasks.append(ViewTask(slot=batch.slot.slot, begin=begin, epoch=epoch, samples=part))
        return True

    def _hand_out(self) -> None:
        for held in range(_QUEUED):
            for worker in self._workers:
                if self._tasks and worker.held == held:
                    worker.give(self._tasks.popleft())

    def _collect(self) -> None:
        """Wait until a worker reports, the consumer has taken a batch, or the loader is closed."""
        by_connection: dict[object, _Worker] = {worker.child.connection: worker for worker in self._workers}
        for ready in wait([*(worker.child.connection for worker in self._workers), self._ring.bell.descriptor]):
            if ready == self._ring.bell.descriptor:
                self._ring.bell.clear()
                continue
            report = by_connection[ready].report()
            batch = next(batch for batch in self._batches if batch.slot.slot.number == report.slot)
            batch.missing -= report.num_samples
            batch.replaced += report.replaced

    def _hand_over(self, batch: _Unfinished) -> None:
        num = len(batch.samples)
        arrays = batch.slot.arrays
        samples, labels = arrays.samples[:num].copy(), arrays.labels[:num].copy()
        views = tuple(torch.from_numpy(view[:num]).permute(0, 3, 1, 2) for view in batch.slot.lease())
        if self._device.type != "cpu":
            views = tuple(view.to(self._device, memory_format=torch.channels_last) for view in views)
        self._out.put(Made(samples=samples, labels=labels, views=views, replaced=batch.replaced))


class _Worker:
    """A worker process, and the tasks that it holds."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.held = 0

    def give(self, task: ViewTask) -> None:
        self.child.send(task)
        self.held += 1

    def report(self) -> TaskReport:
        report: TaskReport = self.child.receive()
        self.held -= 1
        return report


class _Bell:
    """Wakes the thread that waits for it; safe to ring from any thread, also when no one waits any more."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()

    def ring(self) -> None:
        with self._lock:
            if self.descriptor >= 0:
                os.eventfd_write(self.descriptor, 1)

    def clear(self) -> None:
        os.eventfd_read(self.descriptor)

    def close(self) -> None:
        with self._lock:
            os.close(self.descriptor)
            self.descriptor = -1


class _Ring:
    """Slots of anonymous shared memory: as many as are in use at once, used again and again.

    The memory has no name in a file system, so nothing stays behind whatever kills this process.
    """

    def __init__(self, spec: WorkerSpec, capacity: int) -> None:
        self._spec = spec
        self._capacity = capacity
        self._free: deque[_RingSlot] = deque()
        self._descriptors: list[int] = []
        self.bell = _Bell()

    def take(self) -> "_RingSlot":
        try:
            return self._free.popleft()
        except IndexError:
            return self._grow()

    def close(self) -> None:
        self._free.clear()
        self.bell.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _grow(self) -> "_RingSlot":
        descriptor = create_shared("moco-fast-views", slot_bytes(self._spec, self._capacity))
        self._descriptors.append(descriptor)
        slot = ViewSlot(path=shared_path(descriptor), number=len(self._descriptors), capacity=self._capacity)
        return _RingSlot(slot, map_slot(slot, self._spec), self._spec.sizes, self._free)


class _RingSlot:
    """One slot; `lease` gives its views, and when the last of them is dropped the slot is free again."""

    def __init__(self, slot: ViewSlot, arrays: SlotArrays, sizes: tuple[int, ...], free: "deque[_RingSlot]") -> None:
        self._sizes = sizes
        self.slot = slot
        self.arrays = arrays
        self._free = free

    def lease(self) -> list[npt.NDArray[np.uint8]]:
        """Views in memory that comes back when the last of them is dropped."""
        lent = lend(self.arrays.pixels, partial(self._free.append, self))
        return split_views(lent, self._sizes, self.slot.capacity)
