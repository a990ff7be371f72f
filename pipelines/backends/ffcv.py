"""FFCV backend: FFCV's file format, memory manager, operations and compiler, with our order and parameters.

FFCV compiles one operation, which makes all views of a sample from one decode; our thread feeds it batch after batch.
FFCV's own iterator is not used: it wants an epoch's order at once, writes into buffers that a consumer may still hold,
and an exception in it leaves the consumer waiting without end. Nor is its decoder, which is inexact and hides damage.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# numba compiles the operation for the types that it meets.

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.backends.base import Job, Made
from pipelines.backends.ffcv_kernels import crc32c, decode, render
from pipelines.backends.ffcv_library import Compiler, Loader, Operation, PipelineSpec, numba
from pipelines.backends.layout import num_view_bytes, split_views, view_begins
from pipelines.backends.pixels import decode as decode_carefully
from pipelines.backends.pixels import render as render_carefully
from pipelines.plan.augment import NUM_PLACES, ViewTable, color_chain
from pipelines.plan.steps import Steps
from pipelines.reading.reader import Reader
from pipelines.reading.samples import PendingSamples
from shards.ground.arrays import Indices, Pixels
from shards.ground.channel import Channel, ChannelClosed
from shards.ground.memory import lend

__all__ = ["FfcvViews"]


class FfcvViews:
    """Views of the samples of `steps`, made ahead of need by a thread of its own and those that numba starts.

    Args:
        job: what to do; its shards are a `.beton`.
        steps: (epoch, dense sample numbers) of each batch; consumed in the background.
    """

    def __init__(self, job: Job, steps: Steps) -> None:
        if job.shards.kind != "beton":
            raise ValueError(f"{job.shards.where} is not a .beton: the ffcv backend reads nothing else")
        self._job = job
        self._path = Path(job.shards.where)
        self._sizes = tuple(view.size for view in job.views)
        self._begins = view_begins(self._sizes, job.max_batch)
        self._steps = steps
        self._reader = Reader(job.shards, num_threads=1)
        self._free: list[Pixels] = []
        self._out: Channel[Made] = Channel(job.prefetch)
        self._thread = threading.Thread(target=self._run, name="ffcv-views", daemon=True)
        self._thread.start()

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        return self._out.get()

    def close(self) -> None:
        """End all threads; what is ready is dropped."""
        self._out.close()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        try:
            make_views = None
            for epoch, samples in self._steps:
                make_views = make_views or _compiled(self._path, self._job.num_threads)
                self._out.put(self._make(make_views, epoch, samples))
            self._out.fail(StopIteration())
        except ChannelClosed:
            pass
        except BaseException as error:
            self._out.fail(error)

    def _make(self, make_views: "_MakeViews", epoch: int, samples: Indices) -> Made:
        records = self._reader.records(samples)
        memory = self._borrow()
        views = split_views(memory, self._sizes, self._job.max_batch)
        faults = make_views(_rows(records, self._job.draw(epoch, samples, records), self._sizes, self._begins), memory)
        replaced: tuple[str, ...] = ()
        for place in np.flatnonzero(faults):
            samples, records, reasons = self._remake(epoch, samples, records, int(place), views)
            replaced += reasons
        # (B, S, S, 3) in memory.
        tensors = tuple(torch.from_numpy(view[: len(samples)]).permute(0, 3, 1, 2) for view in views)
        if self._job.device.type != "cpu":
            tensors = tuple(tensor.to(self._job.device, memory_format=torch.channels_last) for tensor in tensors)
        labels = records["label"].astype(np.int64)
        return Made(samples=samples, labels=labels, views=tensors, replaced=replaced)

    def _remake(
        self, epoch: int, samples: Indices, records: npt.NDArray[np.void], place: int, views: list[Pixels]
    ) -> tuple[Indices, npt.NDArray[np.void], tuple[str, ...]]:
        """Do a failed sample as the torch backend does: it decodes odd JPEGs, and reports or replaces damaged ones."""
        taken = PendingSamples(self._reader, samples[place : place + 1]).take(decode_carefully, skip=self._job.skip)
        samples, records = samples.copy(), records.copy()
        samples[place], records[place] = taken.samples[0], taken.records[0]
        for table, view in zip(self._job.draw(epoch, taken.samples, taken.records), views, strict=True):
            render_carefully(taken.images[0], table, 0, view[place])
        return samples, records, taken.replaced

    def _borrow(self) -> Pixels:
        """Memory for a batch, which comes back when its last tensor is dropped: new memory costs page faults."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(num_view_bytes(self._sizes, self._job.max_batch), dtype=np.uint8)
        return lend(memory, lambda: self._free.append(memory))


_MakeViews = Callable[[npt.NDArray[np.void], Pixels], Pixels]
_compiling = threading.Lock()


def _compiled(path: Path, num_threads: int) -> _MakeViews:
    """Give what FFCV compiled for a file; the same again in this process, for compiling takes seconds."""
    state = path.stat()
    with _compiling:
        return _compile(str(path), (state.st_ino, state.st_size, state.st_mtime_ns), num_threads)


# Never dropped: numba trips over itself when what it compiled is collected.
@cache
def _compile(path: str, _state: tuple[int, ...], num_threads: int) -> _MakeViews:
    """Let FFCV compile our operation: a function of (rows, memory) that fills in the views and says which failed."""
    num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)
    threads_of_torch = torch.get_num_threads()
    loader = Loader(
        path,
        batch_size=1,
        num_workers=num_threads,
        # Without a seed, FFCV draws one from numpy's global generator.
        seed=0,
        pipelines={"image": PipelineSpec("image", decoder=_AllViews()), "label": None, "index": None},
    )
    # FFCV takes its number of threads for torch's too.
    torch.set_num_threads(threads_of_torch)
    manager = loader.memory_manager
    # Most of FFCV's 600 MB for a million samples, which only its own orders and its other memory manager use.
    for table in (manager.ptr_to_size, manager.sample_to_pages, manager.page_to_samples):
        table.clear()
    storage = manager.schedule_epoch([])
    storage.__enter__()
    [node] = loader.graph.nodes
    [(stage, _)], _ = loader.code

    def make_views(rows: npt.NDArray[np.void], memory: Pixels) -> Pixels:
        faults = np.ones(len(rows), dtype=np.uint8)
        memories = {f"memory_{node.id}": (memory, faults), f"shared_memory_{node.id}": None}
        # A setting of the calling thread.
        numba.set_num_threads(num_threads)
        stage(batch_indices=np.arange(len(rows)), metadata=rows, storage_state=storage.state, **memories)
        return faults

    return make_views


class _AllViews(Operation):
    """FFCV operation: from rows of parameters to the views in a block of bytes (layout.py) and faults, (samples,)."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        """Ask for no memory: FFCV's is used again while a consumer holds it."""
        return replace(previous_state, jit_mode=True, dtype=np.dtype("u1")), None

    def generate_code(self) -> Callable[..., Any]:
        """Give what FFCV compiles."""
        read: Any = self.memory_read
        numbers = Compiler.get_iterator()

        def make(batch_indices, memory, metadata, storage_state):
            pixels, faults = memory
            for place in numbers(len(batch_indices)):
                row = metadata[batch_indices[place]]
                encoded = read(row["data_ptr"], storage_state)
                if encoded.size == row["size"] and crc32c(encoded) == row["crc32c"]:
                    image = np.empty((row["height"], 3 * row["width"]), np.uint8)
                    if decode(encoded, image):
                        for view in range(row["side"].shape[0]):
                            side = row["side"][view]
                            begin = row["begin"][view] + np.int64(place) * side * side * 3
                            out = pixels[begin : begin + side * side * 3].reshape(side, side, 3)
                            box, flip, sigma = row["box"][view], row["flip"][view], row["sigma"][view]
                            stages, factors = row["stages"][view], row["factors"][view]
                            render(image, box, flip, sigma, row["matrix"][view], stages, factors, out)
                        faults[place] = 0
            return faults

        make.is_parallel = True  # pyright: ignore[reportFunctionMemberAccess] - FFCV looks for it there
        return make


def _rows(
    records: npt.NDArray[np.void], tables: tuple[ViewTable, ...], sizes: Sequence[int], begins: Sequence[int]
) -> npt.NDArray[np.void]:
    """What FFCV hands to the operation as its field's metadata: where each image is, and what is done to its views."""
    num = len(tables)
    fields: list[Any] = [("data_ptr", "<u8"), ("size", "<i8"), ("crc32c", "<u4"), ("width", "<i4"), ("height", "<i4")]
    fields += [("box", "<i4", (num, 4)), ("flip", "u1", (num,)), ("sigma", "<f4", (num,))]
    fields += [("matrix", "<f4", (num, 3, 4))]
    fields += [("stages", "<i4", (num, NUM_PLACES)), ("factors", "<f4", (num, NUM_PLACES))]
    fields += [("side", "<i8", (num,)), ("begin", "<i8", (num,))]
    rows = np.zeros(len(records), dtype=[("f0", fields)])
    row = rows["f0"]
    row["data_ptr"] = records["offset"]
    for name in ("size", "crc32c", "width", "height"):
        row[name] = records[name]
    row["side"], row["begin"] = sizes, begins[:num]
    for view, table in enumerate(tables):
        for name in ("box", "flip", "sigma"):
            row[name][:, view] = getattr(table, name)
        row["matrix"][:, view] = np.eye(3, 4) if table.matrix is None else table.matrix
        row["stages"][:, view], row["factors"][:, view] = color_chain(table)
    return rows
