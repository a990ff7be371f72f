"""Loaders: batches of views for training, batches of central crops for evaluation."""

import atexit
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pipelines.backends.engines import Engines, choose_load, describe_engines, find_engines
from pipelines.backends.registry import BACKENDS, Job, Stream, choose, choose_num_threads
from pipelines.batch import Batch
from pipelines.config import DataConfig, ViewsConfig, refuse_unused, tars_to_stream
from pipelines.plan.order import OrderPlan, check_ranks
from pipelines.reading.reader import READ_THREADS
from pipelines.reading.samples import EpochSteps, ListedSteps, draw_central, draw_training
from pipelines.reading.sets import cache_for_evaluation, cache_for_training, open_readable
from shards import ShardSet
from shards.ground.arrays import Indices
from shards.ground.cpus import available_cpus
from shards.sets.beton import BetonSet
from shards.sets.manifest import describe_jpegs

if TYPE_CHECKING:
    from pipelines.backends.streamed import StreamPlan

__all__ = ["EvalLoader", "Loader", "choose_decoding", "make_views", "open_eval_loader", "open_loader"]


_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class Loader:
    """Two augmented views of every sample, in an order that is a pure function of the seed.

    Iterating gives what is left of the current epoch; the next iteration is the next epoch. Batches are made ahead of
    need, over the epoch's end too. Close it, or use it as a context manager; a loader that is dropped closes itself.

    Attributes:
        num_samples: samples in the whole set.
        batch_size: samples in a global step.
        description: which backend runs, and why, in one line.
        num_replaced: damaged samples of this rank that were replaced by others (`on_bad_sample`).
    """

    def __init__(
        self,
        plan: "OrderPlan | StreamPlan",
        start: Callable[[int, int], Stream],
        *,
        device: torch.device,
        description: str,
    ):
        self.num_samples = plan.num_samples
        self.batch_size = plan.batch_size
        self.description = description
        self.num_replaced = 0
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

    def __iter__(self) -> Iterator[Batch]:
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

    def _next(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed: open another one")
        self._kept.mark()
        if self._stream is None:
            self._stream = self._start(self._epoch, self._step)
            self._finalizer = _close_with(self, self._stream)
        made = self._stream.get()
        for reason in made.replaced:
            self.num_replaced += 1
            _LOG.warning("replaced by the next good sample: %s", reason)
        self._kept.add(*made.views)
        return Batch(
            views=made.views,
            index=torch.from_numpy(made.samples),
            label=torch.from_numpy(made.labels),
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

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        stream = self._start()
        self._finalizer = finalizer = _close_with(self, stream)
        kept = _HandedOver(self._device)
        try:
            for _ in range(self._num_batches):
                made = stream.get()
                kept.add(*made.views)
                yield Batch(views=made.views, index=torch.from_numpy(made.samples), label=torch.from_numpy(made.labels))
                kept.mark()
        finally:
            kept.clear()
            finalizer()

    def close(self) -> None:
        """End all threads."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None


def _close_with(owner: object, stream: Stream) -> "weakref.finalize[Any, Any]":
    """Close a stream with its owner, and when the interpreter ends before the backend's library does."""
    finalizer = weakref.finalize(owner, stream.close)
    # Last registered, first called. The registry of weakref is older than DALI's, which shuts down pipelines in use.
    atexit.register(finalizer)
    return finalizer


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
    tars = tars_to_stream(data)
    if tars:
        ranks = (rank, world_size, local_world_size)
        return _open_streamed(tars, data, views, seed=seed, device=device, ranks=ranks)
    skip = data.on_bad_sample == "skip"
    shards = open_readable(data.shards, skip=skip)
    plan = OrderPlan(
        shard_sizes=shards.shard_sizes,
        seed=seed,
        batch_size=data.batch_size,
        lanes=data.lanes,
        window_shards=data.window_shards,
    )
    check_ranks(data.batch_size, world_size)
    shards = cache_for_training(shards, data, plan, world_size=world_size, local_world_size=local_world_size)
    name, reason = choose(data.backend, device=device, size=views.size, is_beton=isinstance(shards, BetonSet))
    refuse_unused(data, name, on_gpu=device.type == "cuda")
    load, engines = choose_decoding(name, data, device)
    job = Job(
        shards=shards,
        draw=partial(draw_training, views=views, seed=seed),
        views=(views.query, views.key),
        size=views.size,
        max_batch=data.batch_size // world_size,
        device=device,
        num_threads=choose_num_threads(name, data.num_threads, device=device, local_world_size=local_world_size),
        skip=skip,
        read_threads=data.read_threads or READ_THREADS,
        prefetch=data.prefetch,
        hw_decoder_load=load,
    )

    def start(epoch: int, step: int) -> Stream:
        return BACKENDS[name](job, EpochSteps(plan=plan, epoch=epoch, step=step, rank=rank, world_size=world_size))

    what = "processes" if name == "torch" else "threads"
    description = f"{name} ({reason}), {job.num_threads} {what} per rank, {plan.num_lanes} lanes"
    if engines is not None:
        description += f"; {describe_engines(engines, load)}"
        if engines.count:
            description += f"; {describe_jpegs(shards.manifest)}"
    return Loader(plan, start, device=device, description=description)


def choose_decoding(name: str, data: DataConfig, device: torch.device) -> tuple[float, Engines | None]:
    """Settle the share of the images for the GPU's JPEG engines, and tell of them; (0, None) where none are used."""
    if name != "dali" or device.type != "cuda":
        return 0.0, None
    engines = find_engines(device)
    return choose_load(engines) if data.hw_decoder_load is None else data.hw_decoder_load, engines


def _open_streamed(
    tars: tuple[str, ...],
    data: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    device: torch.device,
    ranks: tuple[int, int, int],
) -> Loader:
    """A loader over tars without an index; `ranks` are (rank, world size, local world size)."""
    index = f"`make-shards index {data.shards}` makes one"
    if data.stream_samples is None:
        raise ValueError(
            f"{data.shards} has tars, but no index of them: {index}; or stream them as they are, with "
            "--data.stream-samples N (of an epoch)"
        )
    if data.backend not in ("auto", "torch"):
        raise ValueError(
            f"--data.backend {data.backend} needs an index: {index}; tars without one are streamed by the torch backend"
        )
    refuse_unused(data, "torch", on_gpu=device.type == "cuda")
    # Not above: webdataset and torch's workers are only loaded by those who stream.
    from pipelines.backends.streamed import Place, StreamedViews, StreamPlan, StreamSpec

    rank, world_size, local_world_size = ranks
    plan = StreamPlan(tars=tars, num_samples=data.stream_samples, batch_size=data.batch_size)
    if data.batch_size % world_size:
        raise ValueError(f"batch_size {data.batch_size} does not divide among {world_size} ranks")
    spec = StreamSpec(
        plan=plan,
        draw=partial(draw_training, views=views, seed=seed),
        views=(views.query, views.key),
        size=views.size,
        skip=data.on_bad_sample == "skip",
        num_samples=data.batch_size // world_size,
    )
    num_workers = data.num_threads or available_cpus(local_world_size)

    def start(epoch: int, step: int) -> Stream:
        place = Place(seed=seed, epoch=epoch, step=step, rank=rank)
        return StreamedViews(spec, place, device=device, num_workers=num_workers, prefetch=data.prefetch)

    description = (
        f"torch ({len(tars)} tars without an index, streamed), {num_workers} processes per rank; shards are drawn with "
        "replacement, and a resumed run goes on with other samples"
    )
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
    local_world_size: int = 1,
    backend: str = "dali",
    data: DataConfig | None = None,
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
        local_world_size: ranks on this machine, which share its CPUs.
        backend: as in DataConfig.
        data: of the run: its cache, and what is done about samples that cannot be read; not its shards.

    Raises:
        ValueError: shards that are absent or unfinished, or a number out of its range.
    """
    if not 0 < crop <= 1:
        raise ValueError(f"crop is {crop}: it must lie above 0 and at most at 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")
    data = data or DataConfig(shards=shards)
    skip = data.on_bad_sample == "skip"
    opened = open_readable(shards, skip=skip)
    wanted = np.arange(opened.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < opened.num_samples:
        raise ValueError(f"indices reach beyond the {opened.num_samples} samples of {shards}")
    mine = wanted[len(wanted) * rank // world_size : len(wanted) * (rank + 1) // world_size]
    opened = cache_for_evaluation(opened, data, mine, local_world_size=local_world_size)
    name, _ = choose(backend, device=device, size=size, is_beton=isinstance(opened, BetonSet))
    job = Job(
        shards=opened,
        draw=partial(draw_central, crop=crop),
        views=(None,),
        size=size,
        max_batch=batch_size,
        device=device,
        num_threads=choose_num_threads(name, data.num_threads, device=device, local_world_size=local_world_size),
        skip=skip,
        hw_decoder_load=choose_decoding(name, data, device)[0],
    )

    def start() -> Stream:
        return BACKENDS[name](job, ListedSteps(samples=mine, batch_size=batch_size))

    return EvalLoader(start, -(-len(mine) // batch_size), device)


def make_views(
    shards: ShardSet,
    samples: Indices,
    views: ViewsConfig,
    *,
    seed: int,
    epoch: int,
    backend: str = "dali",
    device: torch.device = _CPU,
) -> tuple[torch.Tensor, ...]:
    """Make the query and the key views of chosen samples as a run would: (n, 3, S, S) uint8 each, on the device."""
    name, _ = choose(backend, device=device, size=views.size, is_beton=isinstance(shards, BetonSet))
    job = Job(
        shards=shards,
        draw=partial(draw_training, views=views, seed=seed),
        views=(views.query, views.key),
        size=views.size,
        max_batch=len(samples),
        device=device,
        num_threads=1,
    )
    stream = BACKENDS[name](job, ListedSteps(samples=samples, batch_size=len(samples), epoch=epoch))
    try:
        # A copy of one's own: a backend may take its memory back once it is closed.
        made = stream.get().views
        kept = _HandedOver(device)
        kept.add(*made)
        copies = tuple(view.clone() for view in made)
        kept.clear()
        return copies
    finally:
        stream.close()
