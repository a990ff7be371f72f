"""Construction of a run's parts from its configuration, as they are before the first step.

Encoders do not depend on rank, device or precision: all of that is applied here, from outside.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from moco_fast import distributed
from moco_fast.config import Config
from moco_fast.distributed import broadcast_
from moco_fast.encoders.encoder import Encoder, build_encoder, check_image_size
from moco_fast.evaluation.base import RunSets
from moco_fast.evaluation.labels import label_counts
from moco_fast.evaluation.online import OnlineProbe
from moco_fast.methods.base import Objective, Setting
from moco_fast.methods.batchnorm import convert_batch_norm
from moco_fast.methods.shuffle import build_policy
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.training.runtime import Runtime
from moco_fast.training.schedule import run_length
from moco_fast.training.step import TrainStep
from pipelines.config import tars_to_stream
from pipelines.loader import Loader, open_loader
from shards.sets import ShardSet, open_set

__all__ = ["Parts", "build", "open_run_loader", "open_sets"]


_LOWER_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of a run; `train_step` is built from the others."""

    query: Encoder
    objective: Objective
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    loader: Loader
    num_steps: int
    probe: OnlineProbe | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules that a checkpoint keeps, by the prefix of their tensors' names."""
        probe = {} if self.probe is None else {"probe": self.probe}
        return {"query": self.query, **self.objective.modules, **probe}


def open_sets(config: Config) -> RunSets:
    """Open each of a run's sets once per machine; collective. Raises ValueError: one is missing or unfinished."""

    @cache
    def opened(where: str) -> ShardSet:
        shards = open_set(where)
        # Of a million shards it takes half a second: kept, it is known to all ranks.
        assert shards.manifest.identity
        return shards

    def opened_all() -> RunSets:
        return RunSets(
            training=None if tars_to_stream(config.data) else opened(config.data.shards),
            held_out=None if config.eval.shards is None else opened(config.eval.shards),
        )

    return distributed.once_per_node(opened_all)


def build(
    config: Config,
    runtime: Runtime,
    shards: ShardSet | None = None,
    *,
    initial: Mapping[str, Tensor] | None = None,
) -> Parts:
    """Build the parts of a run as they are before the first step, equal on all ranks.

    Args:
        config: the run's configuration.
        runtime: the process's runtime.
        shards: the training set, if it is already open.
        initial: weights of the query encoder in place of random ones; only the first rank's matter.

    Raises:
        ValueError: the configuration does not fit the data or the world.
    """
    if config.data.batch_size % runtime.world_size:
        raise ValueError(
            f"--data.batch-size {config.data.batch_size} is not divisible by {runtime.world_size} ranks: "
            f"use a multiple of {runtime.world_size}"
        )
    if config.optim.kernels == "apex" and runtime.device.type != "cuda":
        raise ValueError("--optim.kernels apex has kernels for GPUs only: on the CPU use --optim.kernels torch")
    torch.manual_seed(config.run.seed)
    query = build_encoder(config.model, config.method, image_size=config.views.size, crop=config.eval.crop)
    if initial is not None:
        query.load_state_dict(initial, strict=False)
    check_image_size(query, config.model.encoder, config.views.size)
    if config.views.num_small:
        check_image_size(query, config.model.encoder, config.views.small_size, option="--views.small-size")
    convert_batch_norm(query, config.bn)
    query.to(runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - undeclared
    broadcast_([*query.parameters(), *query.buffers()])
    optimizer = build_optimizer(query, config.optim, constant_lr=config.method.constant_lr)
    loader = open_run_loader(config, runtime, shards)
    objective = config.method.build(_setting(config, runtime, query, num_samples=loader.num_samples))
    _compile(query, runtime)
    probe = _build_probe(config, runtime, query, shards)
    train_step = TrainStep(
        query=runtime.wrap_model(query, backwards_per_step=config.optim.accumulate * objective.num_passes),
        objective=objective,
        optimizer=runtime.wrap_optimizer(optimizer),
        clip_norm=config.optim.clip_norm,
        autocast=runtime.autocast,
        backward=runtime.backward,
        unscale=runtime.unscale,
        probe=probe,
    )
    return Parts(
        query=query,
        objective=objective,
        optimizer=optimizer,
        train_step=train_step,
        loader=loader,
        num_steps=run_length(config, batches_per_epoch=len(loader)),
        probe=probe,
    )


def open_run_loader(config: Config, runtime: Runtime, shards: ShardSet | None = None) -> Loader:
    """Open this rank's loader of the training set, which may be open already, with the views that the method uses.

    Raises:
        ValueError: the configuration does not fit the data or the world.
    """
    views = config.method.views_of(config.views)
    return open_loader(
        config.data, views, seed=config.run.seed, device=runtime.device, world=runtime.world, shards=shards
    )


def _build_probe(config: Config, runtime: Runtime, query: Encoder, shards: ShardSet | None) -> OnlineProbe | None:
    if not config.eval.online_probe:
        return None
    shards = shards or open_set(config.data.shards)
    return OnlineProbe(
        query.feature_dim,
        len(shards.class_names) or len(label_counts(shards)),
        lr=config.eval.probe_lr,
        seed=config.run.seed,
        device=runtime.device,
    )


def _setting(config: Config, runtime: Runtime, query: Encoder, *, num_samples: int) -> Setting:
    return Setting(
        query=query,
        policy=build_policy(
            config.bn,
            batch_size=config.data.batch_size // runtime.world_size,
            local_world_size=runtime.local_world_size,
        ),
        autocast=runtime.autocast,
        lower_precision=_LOWER_PRECISIONS.get(runtime.precision),
        compile=lambda encoder: _compile(encoder, runtime),
        num_samples=num_samples,
        seed=config.run.seed,
        device=runtime.device,
        available_bytes=_available_bytes(runtime.device),
    )


def _compile(encoder: nn.Module, runtime: Runtime) -> None:
    if runtime.compile_options is not None:
        encoder.compile(**runtime.compile_options)


def _available_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or all memory of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
