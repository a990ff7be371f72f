"""DALI backend: encoded bytes and parameter tables in, views out. One definition for the CPU and the GPU.

DALI's stages, with uint8 between them: decode, crop-and-resize (linear, antialiased; a reversed region is the flip), on
a GPU Gaussian blur. The rest follows in place: on a GPU colors by two kernels of ours, on the CPU blur and colors as
the torch backend does them.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn as untyped_fn
from nvidia.dali import types as untyped_types
from nvidia.dali.backend import TensorCPU
from nvidia.dali.pipeline import Pipeline, pipeline_def
from simplejpeg import encode_jpeg

from pipelines.backends.base import Job, Made
from pipelines.backends.undecodable import Undecodable
from pipelines.plan.augment import ViewTable
from pipelines.plan.steps import Steps
from pipelines.reading.read_process import ReadingSpec
from pipelines.reading.readahead import EncodedBatch, ReadAhead
from shards.ground.arrays import Encoded
from shards.ground.channel import Channel, ChannelClosed
from shards.sets.manifest import Manifest

__all__ = ["DaliViews", "inputs_of", "size_hints", "to_torch"]

# DALI makes its operators and type names at run time: their stubs know half of what works.
fn: Any = untyped_fn
types: Any = untyped_types

_Finish = Callable[[tuple[torch.Tensor, ...], tuple[ViewTable, ...]], None]

_MOST_HINTED_BYTES = 2 << 30


class DaliViews:
    """Views of the samples of `steps`, made ahead of need by a thread of its own.

    Args:
        job: what to do.
        steps: (epoch, dense sample numbers) of each batch; consumed in the background.
    """

    def __init__(self, job: Job, steps: Steps) -> None:
        self._job = job
        on_gpu = job.device.type == "cuda"
        self._undecodable = Undecodable(job, partial(_can_decode, job=job), decoder="DALI")
        self._closing = ExitStack()
        self._finish = (
            _finishing_on_gpu(job.device) if on_gpu else self._closing.enter_context(_finishing_on_cpu(job.num_threads))
        )
        self._batches = ReadAhead(
            ReadingSpec(
                shards=job.shards,
                steps=steps,
                draw=job.draw,
                max_batch=job.max_batch,
                ahead=job.prefetch,
                num_threads=job.read_threads,
                skip=job.skip,
            )
        )
        self._out: Channel[Made] = Channel(job.prefetch)
        self._thread = threading.Thread(target=self._run, name="dali-views", daemon=True)
        self._thread.start()

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        return self._out.get()

    def close(self) -> None:
        """End the thread and the reader process; what is ready is dropped."""
        self._out.close()
        self._batches.interrupt()
        self._thread.join()
        self._batches.close()
        self._closing.close()

    def _run(self) -> None:
        try:
            # The first `schedule_run` starts as many runs as DALI's queue is long: there must be input for all of them.
            under_way = deque(islice(self._batches, self._job.prefetch))
            if under_way:
                self._hand_over_all(under_way)
            self._out.fail(StopIteration())
        except ChannelClosed:
            pass
        except BaseException as error:
            self._out.fail(error)

    def _hand_over_all(self, under_way: deque[EncodedBatch]) -> None:
        pipe = self._start(under_way)
        while under_way:
            try:
                outputs = pipe.outputs()
            except RuntimeError:
                # A pipeline that has failed is of no more use.
                del pipe
                if not self._undecodable.find(under_way):
                    raise
                under_way = deque(map(self._undecodable.replace, under_way))
                pipe = self._start(under_way)
                continue
            # DALI reads the encoded bytes where they lie: a batch is kept until its views are out.
            done = under_way.popleft()
            batch = next(self._batches, None)
            if batch is not None:
                batch = self._undecodable.replace(batch)
                self._feed(pipe, batch)
                pipe.schedule_run()
                under_way.append(batch)
            views = tuple(to_torch(view.as_tensor()) for view in outputs)
            self._finish(views, done.tables)
            channels_last = tuple(view.permute(0, 3, 1, 2) for view in views)
            self._out.put(Made(samples=done.samples, labels=done.labels, views=channels_last, replaced=done.replaced))

    def _start(self, under_way: deque[EncodedBatch]) -> Pipeline:
        pipe = _build(self._job, depth=len(under_way))
        for batch in under_way:
            self._feed(pipe, batch)
        pipe.schedule_run()
        return pipe

    def _feed(self, pipe: Pipeline, batch: EncodedBatch) -> None:
        for name, data in inputs_of(batch).items():
            pipe.feed_input(name, data)


def to_torch(output: Any) -> torch.Tensor:
    """Wrap a DALI tensor that `Pipeline.outputs` has waited for, without a copy and without making any stream wait.

    No copy: the dynamic executor writes to no output that someone still holds. Stream -1 is DLPack's "do not
    synchronize". `torch.from_dlpack(output)` would name the caller's stream instead; once `outputs` has waited, DALI
    no longer has an event of this batch, and makes that stream wait for all that is queued on its own: the next batch
    (`ToDLMTensor`, dali/python/backend_impl.cc of DALI 2.4).
    """
    return torch.from_dlpack(output.__dlpack__(stream=-1))


@contextmanager
def _finishing_on_cpu(num_threads: int) -> "Generator[_Finish]":
    """Give what blurs and recolors by threads; nearly all of their work is OpenCV's, without the interpreter's lock."""
    from pipelines.backends.pixels import finish

    def finish_rows(views: tuple[torch.Tensor, ...], tables: tuple[ViewTable, ...], first: int) -> None:
        for view, table in zip(views, tables, strict=True):
            pixels = view.numpy()
            for row in range(first, len(pixels), num_threads):
                finish(table, row, pixels[row])

    with ThreadPoolExecutor(num_threads, thread_name_prefix="dali-finish") as pool:

        def finish_on_cpu(views: tuple[torch.Tensor, ...], tables: tuple[ViewTable, ...]) -> None:
            for done in [pool.submit(finish_rows, views, tables, first) for first in range(num_threads)]:
                done.result()

        yield finish_on_cpu


def _finishing_on_gpu(device: torch.device) -> "_Finish":
    from pipelines.backends.color_kernels import recolor_batch

    # Of high priority: the kernels of the training step would keep these waiting.
    stream = torch.cuda.Stream(device, priority=-1)

    def recolor_on_gpu(views: tuple[torch.Tensor, ...], tables: tuple[ViewTable, ...]) -> None:
        with torch.cuda.stream(stream):
            recolor_batch(views, tables)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        # This thread waits, as it does for DALI's part, so that no stream and no other thread has to.
        done.synchronize()

    return recolor_on_gpu


def _build(job: Job, *, depth: int) -> Pipeline:
    on_gpu = job.device.type == "cuda"
    pipe = _views(
        [(view.size, on_gpu and view.may_blur) for view in job.views],
        "mixed" if on_gpu else "cpu",
        {"hw_decoder_load": job.hw_decoder_load, **size_hints(job.shards.manifest, job.max_batch)},
        batch_size=job.max_batch,
        num_threads=job.num_threads,
        device_id=(job.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )
    pipe.build()
    return pipe


def size_hints(manifest: Manifest, batch_size: int) -> dict[str, int]:
    """Sizes for which the GPU's decoder takes its memory at the start, instead of growing in the first epoch.

    The set's largest sides, unless a whole batch of such images would be out of proportion: one huge photo among a
    billion is met with a larger buffer when it comes.
    """
    if batch_size * manifest.max_width * manifest.max_height * 3 > _MOST_HINTED_BYTES:
        return {}
    return {"preallocate_width_hint": manifest.max_width, "preallocate_height_hint": manifest.max_height}


def _can_decode(encoded: Sequence[Encoded], job: Job) -> bool:
    """Whether DALI decodes all of some images.

    Raises:
        RuntimeError: DALI decodes nothing at all: it's the machine, and not the images.
    """
    try:
        _decode(encoded, job)
    except RuntimeError:
        _decode([np.frombuffer(encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8)), dtype=np.uint8)], job)
        return False
    return True


def _decode(encoded: Sequence[Encoded], job: Job) -> None:
    """Decode images in a pipeline of their own. Raises RuntimeError where DALI can't."""
    on_gpu = job.device.type == "cuda"
    pipe = _decoded(
        "mixed" if on_gpu else "cpu",
        batch_size=len(encoded),
        num_threads=job.num_threads,
        device_id=(job.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
    )
    pipe.run(encoded=list(encoded))


@pipeline_def
def _decoded(decoder: str) -> Any:
    return fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), device=decoder, output_type=types.RGB
    )


@pipeline_def(enable_conditionals=True)
def _views(views: list[tuple[int, bool]], decoder: str, decoding: dict[str, Any]) -> tuple[Any, ...]:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    # The packer has turned the pixels already, and the boxes are in stored coordinates.
    images = fn.decoders.image(
        encoded,
        device=decoder,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **decoding,
    )
    return tuple(_view(images, size, number, blurs=blurs) for number, (size, blurs) in enumerate(views))


def _view(images: Any, size: int, number: int, *, blurs: bool) -> Any:
    crop = fn.external_source(name=f"crop_{number}", dtype=types.FLOAT, ndim=1)
    view = fn.resize(
        images,
        size=(size, size),
        roi_start=crop[0:2],
        roi_end=crop[2:4],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    if blurs:
        # DALI turns an `if` over a parameter into a split and a merge of the batch.
        sigma = crop[4]
        if sigma > 0:
            view = fn.gaussian_blur(view, sigma=sigma)
    return view


def inputs_of(batch: EncodedBatch) -> dict[str, Any]:
    """What the graph is fed with, by name: the encoded images, and an array for each view.

    As few as there can be: feeding one holds the interpreter for some 13 us, whatever is in it. The images are wrapped
    here, for DALI takes half as long again to find out what each array is.
    """
    inputs: dict[str, Any] = {"encoded": [TensorCPU(image) for image in batch.encoded]}
    return inputs | {f"crop_{number}": _crops(table) for number, table in enumerate(batch.tables)}


def _crops(table: ViewTable) -> npt.NDArray[np.float32]:
    """(n, 5): the region's begin and end (y, x, y, x), and the blur's sigma."""
    box = table.box.astype(np.float32)
    x, y, right, bottom = box[:, 0], box[:, 1], box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]
    left, right = np.where(table.flip, right, x), np.where(table.flip, x, right)
    return np.stack((y, left, bottom, right, table.sigma), axis=1)
