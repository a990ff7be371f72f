"""Stages of loading, each measured separately: bytes, decoded images, and the copy to the device."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import TypeGuard

import torch

from moco_fast.config import Config
from moco_fast.training.build import open_run_loader
from moco_fast.training.runtime import Runtime
from pipelines.backends.registry import BACKENDS, STREAMING, choose
from pipelines.batch import Batch
from pipelines.config import Backend, ViewConfig, ViewsConfig
from pipelines.loader import Loader
from pipelines.plan.order import EpochOrder, OrderPlan, choose_lanes
from pipelines.reading.prepare import cache_for_training
from pipelines.reading.reader import READ_THREADS, Reader
from pipelines.reading.samples import PendingSamples
from shards.sets import ShardSet

__all__ = ["can_read", "decoding", "made_on_device", "reading", "resident_batch"]

# Two crops of a few pixels without augmentation: what remains is decoding.
_NOTHING = ViewConfig(crop_scale=(1e-4, 2e-4), flip_p=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
_SMALLEST = ViewsConfig(size=8, query=_NOTHING, key=_NOTHING)


@contextmanager
def reading(config: Config, runtime: Runtime, shards: ShardSet) -> Generator[Iterator[int]]:
    """Yield an endless iterator over the number of encoded bytes in this rank's share of a batch, read and verified.

    It reads epoch 1 of a run, while the loader is measured in epoch 0: if the set is large, the samples differ.
    """
    data = config.data
    plan = OrderPlan(
        shard_sizes=shards.shard_sizes,
        seed=config.run.seed,
        batch_size=data.batch_size,
        lanes=data.lanes or choose_lanes(data.batch_size, runtime.world.num_nodes),
        window_shards=data.window_shards,
    )
    # Remote shards are read through the machine's cache, as in a run.
    shards = cache_for_training(shards, data, plan, world=runtime.world)
    reader = Reader(shards, num_threads=data.read_threads or READ_THREADS)

    def batches() -> Iterator[int]:
        under_way: deque[PendingSamples] = deque()
        for epoch in count(1):
            order = EpochOrder(plan, epoch)
            for step in range(plan.num_steps):
                under_way.append(PendingSamples(reader, order.rank_step(step, runtime.rank, runtime.world_size)))
                if len(under_way) > data.prefetch:
                    yield sum(image.nbytes for image in under_way.popleft().take(lambda read: read, skip=True).images)

    try:
        yield batches()
    finally:
        reader.close()


def decoding(config: Config, runtime: Runtime, shards: ShardSet) -> Loader:
    """Open the run's loader in epoch 2, with views that cost almost nothing."""
    data = replace(config.data, backend=_backend(config, runtime.device, shards))
    loader = open_run_loader(replace(config, data=data, views=_SMALLEST), runtime, shards)
    loader.load_state_dict({"epoch": 2, "step": 0})
    return loader


def made_on_device(config: Config, device: torch.device, shards: ShardSet | None) -> bool:
    """Return whether the views are made on the device that the step needs them on."""
    return device.type == "cpu" or BACKENDS[_backend(config, device, shards)].decodes_on_gpu


def resident_batch(config: Config, runtime: Runtime, size: int, device: torch.device) -> Batch:
    """Return a batch of `size` samples of this rank in the loader's format, with noise as pixels.

    Its samples are the first of the set, so that a memory bank has a key for each.
    """
    generator = torch.Generator().manual_seed(runtime.rank)
    views = tuple(
        torch.randint(0, 256, (size, 3, view.size, view.size), dtype=torch.uint8, generator=generator).to(
            device, memory_format=torch.channels_last
        )
        for view in config.method.views_of(config.views)
    )
    return Batch(views=views, index=torch.arange(size), label=torch.full((size,), -1))


def can_read(shards: ShardSet | None) -> TypeGuard[ShardSet]:
    """Return whether samples can be read one by one: not from FFCV's file, nor from tars without an index (None)."""
    return shards is not None and shards.kind != "beton"


def _backend(config: Config, device: torch.device, shards: ShardSet | None) -> Backend:
    if shards is None:
        return STREAMING
    name, _ = choose(config.data.backend, device=device, size=config.views.size, kind=shards.kind)
    return name
