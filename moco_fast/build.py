"""From a configuration to the parts of a run, as they are before its first step.

Encoders know no rank, device or precision: all of that is applied here, from outside.
"""

from dataclasses import dataclass

import torch

from moco_fast.batchnorm import build_policy, resolve_policy, use_group_statistics
from moco_fast.config import Config
from moco_fast.distributed import broadcast_
from moco_fast.encoders import Encoder, build_encoder
from moco_fast.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.optim import build_optimizer
from moco_fast.queue import Queue
from moco_fast.runtime import Runtime
from moco_fast.step import TrainStep
from pipelines.loader import Loader, open_loader

__all__ = ["Parts", "build"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run trains and feeds; `train_step` is built of the rest."""

    query: Encoder
    key: Encoder
    queue: Queue
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    loader: Loader
    num_steps: int


def build(config: Config, runtime: Runtime) -> Parts:
    """Build the parts of a run as they are before the first step; equal on all ranks.

    Raises:
        ValueError: the configuration does not fit the data or the world.
    """
    if config.data.batch_size % runtime.world_size:
        raise ValueError(
            f"--data.batch-size {config.data.batch_size} does not divide among {runtime.world_size} ranks: "
            f"take a multiple of {runtime.world_size}"
        )
    policy = build_policy(
        config.bn,
        batch_size=config.data.batch_size // runtime.world_size,
        local_world_size=runtime.local_world_size,
    )
    torch.manual_seed(config.run.seed)
    query = build_encoder(config.model)
    if resolve_policy(config.bn) == "virtual":
        use_group_statistics(query, config.bn.num_groups)
    query.to(runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    broadcast_([*query.parameters(), *query.buffers()])
    key = copy_as_key_encoder(query)
    queue = Queue(config.model.dim, config.moco.queue_size, torch.Generator().manual_seed(config.run.seed))
    queue.to(runtime.device)
    optimizer = build_optimizer(query, config.optim)
    momentum_update = MomentumUpdate(query, key)
    if runtime.compile:
        query.compile()
        key.compile()
    train_step = TrainStep(
        query=runtime.wrap_model(query),
        key=key,
        momentum_update=momentum_update,
        queue=queue,
        policy=policy,
        optimizer=runtime.wrap_optimizer(optimizer),
        temperature=config.moco.temperature,
        autocast=runtime.autocast,
        backward=runtime.backward,
        unscale=runtime.unscale,
    )
    loader = open_loader(
        config.data,
        config.views,
        seed=config.run.seed,
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        local_world_size=runtime.local_world_size,
    )
    num_steps = config.run.steps or max(1, round(config.run.epochs * len(loader) / config.optim.accumulate))
    return Parts(
        query=query,
        key=key,
        queue=queue,
        optimizer=optimizer,
        train_step=train_step,
        loader=loader,
        num_steps=num_steps,
    )
