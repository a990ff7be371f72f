"""Loaders: batches of views for training, batches of central crops for evaluation."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from pipelines.augment import ViewTable
from pipelines.batch import ImageBatch, TwoViewBatch
from pipelines.config import DataConfig, ViewsConfig
from pipelines.cpus import available_cpus
from pipelines.order import OrderPlan, check_ranks
from pipelines.reader import Reader
from pipelines.samples import EncodedBatch, draw_views, encoded_batches, plan_steps
from shards import ShardSet

__all__ = ["EvalLoader", "Loader", "central_crops", "make_views", "open_eval_loader", "open_loader"]

Indices = npt.NDArray[np.int64]


class Stream(Protocol):
    """A running backend."""

    def get(self) -> tuple[EncodedBatch, tuple[torch.Tensor, ...]]:
        """Wait for the next batch and its views. Raises StopIteration at the end, or what went wrong."""
        ...

    def close(self) -> None:
        """End all threads and processes."""
        ...


class Loader:
    """Two augmented views of every sample, in an order that is a pure function of the seed.

    Iterating gives what is left of the current epoch; the next iteration is the next epoch. Batches are made ahead of
    need, over the epoch's end too. Close it, or use it as a context manager; a loader that is dropped closes itself.

    Attributes:
        num_samples: samples in the whole set.
        batch_size: samples in a global step.
        description: which backend runs, and why, in one line.
    """

    def __init__(self, plan: OrderPlan, start: Callable[[int, int], Stream], *, device: torch.device, description: str):
        self.num_samples = plan.num_samples
        self.batch_size = plan.batch_size
        self.description = description
        self._num_steps = plan.num_steps
        self._start = start
        self._epoch = 0
        self._step = 0
        self._kept = _HandedOver(device)
        self._stream: Stream | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Steps in a whole epoch, the same on every rank."""
        return self._num_steps

    def __iter__(self) -> Iterator[TwoViewBatch]:
        epoch = self._epoch
        while self._epoch == epoch:
            batch = self._next()
            self._step += 1
            if self._step == self._num_steps:
                self._epoch, self._step = epoch + 1, 0
            yield batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """Place of the next batch, counted in batches handed over."""
        return {"epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place: the next batch is that one. Costs no replay. Raises ValueError for a place that is none."""
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or not 0 <= step <= self._num_steps:
            raise ValueError(
                f"there is no step {step} in epoch {epoch}: an epoch of this loader has {self._num_steps} steps; was "
                "the state saved with other shards or another batch size?"
            )
        self._stop()
        self._epoch, self._step = (epoch + 1, 0) if step == self._num_steps else (epoch, step)

    def close(self) -> None:
        """End all threads and free what is ready. May be called twice, and in mid-epoch."""
        self._closed = True
        self._stop()
        self._kept.clear()

    def _next(self) -> TwoViewBatch:
        if self._closed:
            raise ValueError("this loader is closed: open another one")
        self._kept.mark()
        if self._stream is None:
            self._stream = self._start(self._epoch, self._step)
            self._finalizer = weakref.finalize(self, self._stream.close)
        encoded, (view_q, view_k) = self._stream.get()
        self._kept.add(view_q, view_k)
        return TwoViewBatch(
            view_q=view_q,
            view_k=view_k,
            index=torch.from_numpy(encoded.samples),
            label=torch.from_numpy(encoded.labels),
        )

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._stream = self._finalizer = None


class EvalLoader:
    """Every sample once, in dense order, as a central crop. Each iteration starts anew."""

    def __init__(self, start: Callable[[], Stream], num_batches: int, device: torch.device) -> None:
        self._start = start
        self._num_batches = num_batches
        self._device = device
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def __len__(self) -> int:
        """Batches of this rank; the last one may be short."""
        return self._num_batches

    def __iter__(self) -> Iterator[ImageBatch]:
        self.close()
        stream = self._start()
        self._finalizer = finalizer = weakref.finalize(self, stream.close)
        kept = _HandedOver(self._device)
        try:
            for _ in range(self._num_batches):
                encoded, (images,) = stream.get()
                kept.add(images)
                yield ImageBatch(
                    images=images, index=torch.from_numpy(encoded.samples), label=torch.from_numpy(encoded.labels)
                )
                kept.mark()
        finally:
            finalizer()

    def close(self) -> None:
        """End all threads."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None


class _HandedOver:
    """Keeps a backend's GPU buffers until the kernels that read them are done.

    DALI takes a buffer back as soon as Python drops it, whatever torch's streams still have to do with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._unmarked: list[torch.Tensor] = []
        self._marked: list[tuple[torch.cuda.Event, list[torch.Tensor]]] = []

    def add(self, *tensors: torch.Tensor) -> None:
        if self._on_gpu:
            self._unmarked.extend(tensors)

    def mark(self) -> None:
        """Everything that reads what was added has been launched on the current stream."""
        if not self._unmarked:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._unmarked[0].device))
        self._marked = [(done, kept) for done, kept in self._marked if not done.query()]
        self._marked.append((event, self._unmarked))
        self._unmarked = []

    def clear(self) -> None:
        self.mark()
        for event, _ in self._marked:
            event.synchronize()
        self._marked = []


def open_loader(
    data: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 1,
) -> Loader:
    """Open the training loader of one rank.

    Raises:
        ValueError: shards that are absent or unfinished, or numbers that do not fit each other.
    """
    from pipelines import dali

    shards = ShardSet.open(data.shards)
    plan = OrderPlan(
        shard_sizes=shards.shard_sizes,
        seed=seed,
        batch_size=data.batch_size,
        lanes=data.lanes,
        window_shards=data.window_shards,
    )
    check_ranks(data.batch_size, world_size)
    num_threads = data.num_threads or available_cpus(local_world_size)
    options = dali.DaliOptions(
        size=views.size, max_batch=data.batch_size // world_size, device=device, num_threads=num_threads
    )
    stages = (dali.ViewStages(views.query), dali.ViewStages(views.key))

    def draw(epoch: int, samples: Indices, records: npt.NDArray[np.void]) -> tuple[ViewTable, ...]:
        return draw_views(views, samples, records, seed=seed, epoch=epoch)

    def start(epoch: int, step: int) -> Stream:
        steps = plan_steps(plan, epoch=epoch, step=step, rank=rank, world_size=world_size)
        reader = Reader(shards, num_threads=data.read_threads)
        batches = encoded_batches(reader, steps, ahead=data.prefetch, draw=draw)
        return _Closing(dali.DaliViews(batches, stages, options, prefetch=data.prefetch), reader)

    where = "on the GPU" if device.type == "cuda" else "on the CPU"
    description = f"dali, decoding {where} with {num_threads} threads; {plan.num_lanes} lanes"
    return Loader(plan, start, device=device, description=description)


def open_eval_loader(
    shards: str,
    *,
    size: int,
    crop: float = 0.875,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    indices: Indices | None = None,
) -> EvalLoader:
    """Open a loader for evaluation.

    Args:
        shards: folder that make-shards wrote.
        size: height and width of an image in pixels.
        crop: side of the central square as a share of the image's shorter side.
        batch_size: of this rank.
        device: where the images shall be.
        rank: takes one contiguous part of the samples.
        world_size: number of parts.
        indices: dense sample numbers to take; all, if not given.

    Raises:
        ValueError: shards that are absent or unfinished, or a number out of its range.
    """
    from pipelines import dali

    if not 0 < crop <= 1:
        raise ValueError(f"crop is {crop}: it must lie above 0 and at most at 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")
    opened = ShardSet.open(shards)
    wanted = np.arange(opened.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < opened.num_samples:
        raise ValueError(f"indices reach beyond the {opened.num_samples} samples of {shards}")
    mine = wanted[len(wanted) * rank // world_size : len(wanted) * (rank + 1) // world_size]
    options = dali.DaliOptions(size=size, max_batch=batch_size, device=device, num_threads=available_cpus())

    def draw(_epoch: int, _samples: Indices, records: npt.NDArray[np.void]) -> tuple[ViewTable, ...]:
        return (central_crops(records["width"].astype(np.int64), records["height"].astype(np.int64), crop),)

    def start() -> Stream:
        steps = ((0, mine[begin : begin + batch_size]) for begin in range(0, len(mine), batch_size))
        reader = Reader(opened)
        batches = encoded_batches(reader, steps, ahead=2, draw=draw)
        return _Closing(dali.DaliViews(batches, (dali.ViewStages(None),), options, prefetch=2), reader)

    return EvalLoader(start, -(-len(mine) // batch_size), device)


def make_views(batch: EncodedBatch, views: ViewsConfig, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Make the views of one batch: (B, 3, H, W) uint8 each."""
    from pipelines import dali

    options = dali.DaliOptions(
        size=views.size, max_batch=len(batch.samples), device=device, num_threads=available_cpus()
    )
    stages = (dali.ViewStages(views.query), dali.ViewStages(views.key))
    stream = dali.DaliViews(iter((batch,)), stages, options, prefetch=1)
    try:
        return stream.get()[1]
    finally:
        stream.close()


def central_crops(width: Indices, height: Indices, crop: float) -> ViewTable:
    """Give the table that cuts the central square of side `crop` times the shorter side and does nothing else."""
    side = np.maximum(1, np.rint(crop * np.minimum(width, height)).astype(np.int64))
    num = len(side)
    identity = np.concatenate((np.eye(3), np.zeros((3, 1))), axis=1)
    return ViewTable(
        box=np.stack(((width - side) // 2, (height - side) // 2, side, side), axis=1).astype(np.int32),
        flip=np.zeros(num, dtype=np.bool_),
        sigma=np.zeros(num, dtype=np.float32),
        matrix=np.broadcast_to(identity.astype(np.float32), (num, 3, 4)),
        solarize=np.zeros(num, dtype=np.bool_),
        factors=np.broadcast_to(np.array([1.0, 1.0, 1.0, 0.0]), (num, 4)),
        jitter_order=np.broadcast_to(np.arange(4), (num, 4)),
        grayscale=np.zeros(num, dtype=np.bool_),
    )


class _Closing:
    """A stream that closes its reader when it is closed."""

    def __init__(self, views: Stream, reader: Reader) -> None:
        self._views = views
        self._reader = reader
        self.get = views.get

    def close(self) -> None:
        self._views.close()
        self._reader.close()
