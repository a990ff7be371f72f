"""Loaders: views of a set's samples, epoch after epoch for training, or of given samples once for evaluation."""

import atexit
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import torch

from pipelines.backends.base import Job, Made, Stream
from pipelines.backends.engines import Engines, choose_load, describe_engines, find_engines
from pipelines.backends.registry import (
    BACKENDS,
    STREAMING,
    choose,
    choose_batches_at_once,
    choose_num_threads,
    refuse_unused,
)
from pipelines.backends.together import start_together
from pipelines.batch import Batch
from pipelines.config import Backend, DataConfig, ViewsConfig, ViewSpec, tars_to_stream
from pipelines.plan.draw import draw_views
from pipelines.plan.order import OrderPlan, check_ranks, choose_lanes
from pipelines.plan.part import PartPlan
from pipelines.plan.steps import EpochSteps, ListedSteps
from pipelines.reading.prepare import (
    cache_for_evaluation,
    cache_for_part,
    cache_for_training,
    keep_decoded,
    refuse_unreadable,
    refuse_without_means,
)
from pipelines.reading.reader import READ_THREADS
from pipelines.world import World
from shards.ground.arrays import Indices
from shards.ground.cpus import available_cpus
from shards.ground.units import counted, gib
from shards.sets import ShardSet, open_set
from shards.sets.manifest import describe_jpegs

if TYPE_CHECKING:
    from pipelines.backends.streamed import StreamPlan

__all__ = ["ListLoader", "Loader", "choose_decoding", "make_views", "open_loader", "specs_of", "suited_to"]


_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class Loader:
    """Loader of epochs: views of every sample, in an order that is a pure function of the seed.

    Iterating gives what is left of the current epoch; the next iteration is the next epoch. Batches are made ahead of
    need, over the epoch's end too. Close it, or use it as a context manager; a loader that is dropped closes itself.

    Attributes:
        num_samples: samples that epochs are made of: those of the whole set, or those that were chosen.
        batch_size: samples in a global step.
        description: which backend runs, and why, in one line.
        num_replaced: damaged samples of this rank that were replaced by others (`on_bad_sample`).
        most_ready: batches that may have been made before they are asked for.
    """

    def __init__(
        self,
        plan: "OrderPlan | PartPlan | StreamPlan",
        start: Callable[[int, int], Stream],
        *,
        device: torch.device,
        description: str,
        most_ready: int,
    ):
        self.num_samples = plan.num_samples
        self.batch_size = plan.batch_size
        self.description = description
        self.num_replaced = 0
        self.most_ready = most_ready
        self._num_steps = plan.num_steps
        self._make_stream = start
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

    def start(self) -> Stream:
        """Begin to make batches, unless it has begun: processes and memory are there before the first is asked for."""
        if self._closed:
            raise ValueError("this loader is closed: open another one")
        if self._stream is None:
            self._stream = self._make_stream(self._epoch, self._step)
            self._finalizer = _close_with(self, self._stream)
        return self._stream

    def close(self) -> None:
        """End all threads and free what is ready. May be called twice, and in mid-epoch."""
        self._closed = True
        self._stop()
        self._kept.clear()

    def _next(self) -> Batch:
        stream = self.start()
        self._kept.mark()
        made = stream.get()
        for reason in made.replaced:
            self.num_replaced += 1
            _LOG.warning("replaced by the next good sample: %s", reason)
        self._kept.add(*made.views)
        return _batch_of(made)

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._stream = self._finalizer = None


class ListLoader:
    """Loader of given samples: their views, in the order in which they were given, once per iteration.

    Attributes:
        replaced: what was wrong with each sample of the newest batch that another took the place of (`on_bad_sample`).
    """

    def __init__(self, start: Callable[[], Stream], num_batches: int, device: torch.device) -> None:
        self.replaced: tuple[str, ...] = ()
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
                self.replaced = made.replaced
                yield _batch_of(made)
                kept.mark()
        finally:
            kept.clear()
            finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None


def _batch_of(made: Made) -> Batch:
    return Batch(views=made.views, index=torch.from_numpy(made.samples), label=torch.from_numpy(made.labels))


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


@overload
def open_loader(
    data: DataConfig,
    views: ViewsConfig | Sequence[ViewSpec],
    *,
    seed: int = 0,
    samples: None = None,
    among: Indices | None = None,
    device: torch.device = _CPU,
    world: World = World(),
    shards: ShardSet | None = None,
) -> Loader: ...


@overload
def open_loader(
    data: DataConfig,
    views: ViewsConfig | Sequence[ViewSpec],
    *,
    seed: int = 0,
    samples: Indices,
    epoch: int = 0,
    device: torch.device = _CPU,
    world: World = World(),
    shards: ShardSet | None = None,
    divided: bool = True,
) -> ListLoader: ...


def open_loader(
    data: DataConfig,
    views: ViewsConfig | Sequence[ViewSpec],
    *,
    seed: int = 0,
    samples: Indices | None = None,
    among: Indices | None = None,
    epoch: int = 0,
    device: torch.device = _CPU,
    world: World = World(),
    shards: ShardSet | None = None,
    divided: bool = True,
) -> Loader | ListLoader:
    """Open one rank's loader of a set: of epochs without end, or of given samples once.

    A batch is a pipelines.batch.Batch. A sample is decoded once, however many views are made of it.

    Args:
        data: shards, global batch size, backend, and how the shards are read; all ranks give the same.
        views: of each sample: a ViewsConfig (such as `VIEWS["moco-v2"]`), or ViewSpecs (`central_crop`, `ten_crop`).
        seed: of the order and of the views' random numbers, 0 to 2**64 - 1.
        samples: (n,) dense sample numbers, taken in this order. None: all samples of the set in every epoch, shuffled.
        among: (n,) dense sample numbers that every epoch consists of in place of all, shuffled.
        epoch: whose random numbers the views of `samples` have; a loader of epochs starts with 0.
        device: where the views are wanted.
        world: this process and how many share each batch.
        shards: the set that `data.shards` names, if it is open already.
        divided: of `samples`, every rank takes one contiguous part; False: they are this rank's alone.

    Returns:
        a Loader: `for batch in loader` is an epoch, `state_dict` its place. With `samples`, a ListLoader.

    Raises:
        ValueError: shards that are absent or unfinished, samples that are not in them, or numbers that do not fit.

    Two augmented views in a plain loop, and a labeled one of the first ten samples:

    >>> import numpy as np
    >>> from pipelines.config import VIEWS, DataConfig, central_crop
    >>> from pipelines.loader import open_loader
    >>> data = DataConfig(shards="shards/train", batch_size=16)
    >>> with open_loader(data, VIEWS["cifar10"], seed=1) as loader:
    ...     for batch in loader:
    ...         query, key = (view.float() / 255 for view in batch.views)
    >>> query.shape, loader.state_dict()
    (torch.Size([16, 3, 32, 32]), {'epoch': 1, 'step': 0})
    >>> with open_loader(data, central_crop(224), samples=np.arange(10)) as loader:
    ...     [batch] = loader
    >>> batch.views[0].shape, batch.label.tolist()
    (torch.Size([10, 3, 224, 224]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    asked = _Asked(data=data, views=specs_of(views), seed=seed, device=device, world=world)
    if shards is None and (tars := tars_to_stream(data)):
        return _open_streamed(tars, asked, by_number=samples is not None or among is not None)
    opened = open_set(data.shards) if shards is None else shards
    if data.on_bad_sample != "skip":
        refuse_unreadable(opened)
    if samples is None:
        return _open_epochs(opened, asked, None if among is None else np.asarray(among, dtype=np.int64))
    return _open_samples(opened, asked, np.asarray(samples, dtype=np.int64), epoch, divided=divided)


def suited_to(data: DataConfig, shards: ShardSet) -> DataConfig:
    """Return a run's settings for another set than its own: with its backend, unless that cannot read the set."""
    if data.backend != "auto" and BACKENDS[data.backend].only_kind not in (None, shards.kind):
        return replace(data, backend="auto")
    return data


def specs_of(views: ViewsConfig | Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    """Return the views one by one. Raises ValueError if there are none."""
    specs = views.specs if isinstance(views, ViewsConfig) else tuple(views)
    if not specs:
        raise ValueError("no view is wanted: a loader makes one view per sample at least")
    return specs


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a loader was asked for."""

    data: DataConfig
    views: tuple[ViewSpec, ...]
    seed: int
    device: torch.device
    world: World


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """A backend, its job and how it was chosen."""

    name: Backend
    reason: str
    job: Job
    engines: Engines | None
    at_once: int
    """Batches that it makes together."""

    @classmethod
    def choose(cls, shards: ShardSet, asked: _Asked, *, max_batch: int) -> "_Decoding":
        """Choose a backend for batches of this rank of at most `max_batch` samples.

        Raises:
            ValueError: no backend can make what was asked for from such a set.
        """
        data, views, device = asked.data, asked.views, asked.device
        refuse_without_means(shards, views)
        largest = max(view.size for view in views)
        name, reason = choose(data.backend, device=device, size=largest, kind=shards.kind)
        load, engines = choose_decoding(name, data, device)
        job = Job(
            shards=shards,
            draw=partial(draw_views, views=views, seed=asked.seed),
            views=views,
            max_batch=max_batch,
            device=device,
            num_threads=choose_num_threads(name, data.num_threads, device=device, world=asked.world),
            skip=data.on_bad_sample == "skip",
            read_threads=data.read_threads or READ_THREADS,
            prefetch=data.prefetch,
            hw_decoder_load=load,
        )
        at_once = choose_batches_at_once(name, max_batch, device=device)
        return cls(name=name, reason=reason, job=job, engines=engines, at_once=at_once)

    def start_epochs(self, steps: EpochSteps) -> Stream:
        """Start the backend on a run's steps."""
        drop = steps.step % self.at_once
        first = replace(steps, step=steps.step - drop)
        return start_together(BACKENDS[self.name].start, self.job, first, at_once=self.at_once, drop=drop)

    def start_list(self, steps: ListedSteps) -> Stream:
        """Start the backend on a list."""
        at_once = max(1, min(self.at_once, steps.num_steps))
        return start_together(BACKENDS[self.name].start, self.job, steps, at_once=at_once)

    @property
    def most_ready(self) -> int:
        """Batches that it and a loader may hold ready: those of the backend's queue and those being handed over."""
        return self.at_once * (2 * self.job.prefetch + 2)

    def describe(self, num_lanes: int) -> str:
        """Say in one line what runs, and why."""
        text = f"{self.name} ({self.reason}), {self.job.num_threads} {BACKENDS[self.name].workers} per rank"
        text += f", {counted(num_lanes, 'lane')}"
        if self.at_once > 1:
            text += f", {self.at_once} batches at once"
        if self.engines is not None:
            text += f"; {describe_engines(self.engines, self.job.hw_decoder_load)}"
            if self.engines.count:
                text += f"; {describe_jpegs(self.job.shards.manifest)}"
        if self.job.decoded is not None:
            text += f"; keeps up to {gib(self.job.decoded.budget_bytes)} of decoded pixels in {self.job.decoded.path}"
        return text


def choose_decoding(name: Backend, data: DataConfig, device: torch.device) -> tuple[float, Engines | None]:
    """Settle the share of the images for the GPU's JPEG engines, and what those are; (0, None) where none are used."""
    if not BACKENDS[name].decodes_on_gpu or device.type != "cuda":
        return 0.0, None
    engines = find_engines(device)
    return choose_load(engines) if data.hw_decoder_load is None else data.hw_decoder_load, engines


def _open_epochs(shards: ShardSet, asked: _Asked, among: Indices | None) -> Loader:
    data, world = asked.data, asked.world
    check_ranks(data.batch_size, world.world_size)
    if among is None:
        plan = OrderPlan(
            shard_sizes=shards.shard_sizes,
            seed=asked.seed,
            batch_size=data.batch_size,
            lanes=data.lanes or choose_lanes(data.batch_size, world.num_nodes),
            window_shards=data.window_shards,
        )
        shards, num_lanes = cache_for_training(shards, data, plan, world=world), plan.num_lanes
    else:
        _refuse_unknown(among, shards)
        plan = PartPlan(samples=among, seed=asked.seed, batch_size=data.batch_size)
        shards, num_lanes = cache_for_part(shards, data, among, world=world), 1
    backend = _Decoding.choose(shards, asked, max_batch=data.batch_size // world.world_size)
    refuse_unused(data, backend.name, on_gpu=asked.device.type == "cuda")
    backend = replace(backend, job=replace(backend.job, decoded=keep_decoded(shards, data)))

    def start(epoch: int, step: int) -> Stream:
        return backend.start_epochs(EpochSteps(plan=plan, epoch=epoch, step=step, world=world))

    description = backend.describe(num_lanes)
    return Loader(plan, start, device=asked.device, description=description, most_ready=backend.most_ready)


def _open_samples(shards: ShardSet, asked: _Asked, samples: Indices, epoch: int, *, divided: bool) -> ListLoader:
    mine = _part_of(samples, asked.world if divided else World(), shards)
    shards = cache_for_evaluation(shards, asked.data, mine, world=asked.world)
    if shards.reads_ranges:
        # Here, where the set stays open: the processes that read end with the list, and would ask again for each.
        shards.records_of(mine)
    batch_size = max(1, asked.data.batch_size // asked.world.world_size)
    backend = _Decoding.choose(shards, asked, max_batch=batch_size)
    return _open_list(backend, ListedSteps(samples=mine, batch_size=batch_size, epoch=epoch))


def _open_list(backend: _Decoding, steps: ListedSteps) -> ListLoader:
    return ListLoader(partial(backend.start_list, steps), steps.num_steps, backend.job.device)


def _part_of(samples: Indices, world: World, shards: ShardSet) -> Indices:
    """Return this rank's part of a list of samples."""
    _refuse_unknown(samples, shards)
    bounds = (len(samples) * rank // world.world_size for rank in (world.rank, world.rank + 1))
    return samples[slice(*bounds)]


def _refuse_unknown(samples: Indices, shards: ShardSet) -> None:
    if samples.size and not 0 <= samples.min() <= samples.max() < shards.num_samples:
        raise ValueError(f"samples reach beyond the {shards.num_samples} samples of {shards.where}")


def _index_first(data: DataConfig) -> str:
    return f"`make-shards index {data.shards}` makes one"


def _open_streamed(tars: tuple[str, ...], asked: _Asked, *, by_number: bool) -> Loader:
    """Open a loader over tars without an index."""
    data, world = asked.data, asked.world
    if by_number:
        raise ValueError(f"{data.shards} has no index, so its samples have no numbers: {_index_first(data)}")
    if data.stream_samples is None:
        raise ValueError(
            f"{data.shards} has tars, but no index of them: {_index_first(data)}; or stream them as they are, with "
            "--data.stream-samples N (of an epoch)"
        )
    if data.backend not in ("auto", STREAMING):
        raise ValueError(
            f"--data.backend {data.backend} needs an index: {_index_first(data)}; tars without one are streamed by the "
            f"{STREAMING} backend"
        )
    if data.cache_decoded is not None:
        raise ValueError(
            f"--data.cache-decoded {data.cache_decoded} means nothing beside --data.stream-samples, whose samples have "
            f"no numbers: leave it out, or index the tars ({_index_first(data)})"
        )
    refuse_unused(data, STREAMING, on_gpu=asked.device.type == "cuda")
    # Not above: webdataset and torch's workers are only loaded by those who stream.
    from pipelines.backends.streamed import StreamedViews, StreamPlace, StreamPlan, StreamSpec

    plan = StreamPlan(tars=tars, num_samples=data.stream_samples, batch_size=data.batch_size)
    check_ranks(data.batch_size, world.world_size)
    spec = StreamSpec(
        plan=plan,
        draw=partial(draw_views, views=asked.views, seed=asked.seed),
        sizes=tuple(view.size for view in asked.views),
        skip=data.on_bad_sample == "skip",
        num_samples=data.batch_size // world.world_size,
    )
    num_workers = data.num_threads or available_cpus(world.local_world_size)

    def start(epoch: int, step: int) -> Stream:
        place = StreamPlace(seed=asked.seed, epoch=epoch, step=step, rank=world.rank)
        return StreamedViews(spec, place, device=asked.device, num_workers=num_workers, prefetch=data.prefetch)

    description = (
        f"{STREAMING} ({len(tars)} tars without an index, streamed), {num_workers} processes per rank; shards are "
        "drawn with replacement, and a resumed run goes on with other samples"
    )
    most_ready = 2 * data.prefetch + 2
    return Loader(plan, start, device=asked.device, description=description, most_ready=most_ready)


def make_views(
    shards: ShardSet,
    samples: Indices,
    views: ViewsConfig | Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    backend: Literal["auto", Backend] = "dali",
    device: torch.device = _CPU,
) -> tuple[torch.Tensor, ...]:
    """Make the views of chosen samples as a run would: (n, 3, S, S) uint8 each, on the device.

    Raises:
        ValueError: colors are to be linear, and the set has no mean colors.
    """
    # The set is open: its path is of no matter.
    data = DataConfig(shards="", backend=backend, num_threads=1)
    asked = _Asked(data=data, views=specs_of(views), seed=seed, device=device, world=World())
    decoding = _Decoding.choose(shards, asked, max_batch=len(samples))
    with _open_list(decoding, ListedSteps(samples=samples, batch_size=len(samples), epoch=epoch)) as loader:
        # A copy of one's own: a backend may take its memory back once it is closed.
        [copies] = [tuple(view.clone() for view in batch.views) for batch in loader]
    return copies
