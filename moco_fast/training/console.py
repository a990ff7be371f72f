"""Messages of a run on the terminal, and the description of its environment."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moco_fast import __version__
from moco_fast.config import Config
from moco_fast.methods.shuffle import resolve_policy
from moco_fast.saving.due import describe
from moco_fast.training.build import Parts
from moco_fast.training.continuing import Changes
from moco_fast.training.runtime import Runtime
from moco_fast.training.schedule import describe_lr
from shards.ground.units import counted

__all__ = ["advice_on_launches", "environment", "print_changes", "print_closing", "print_notes", "print_opening"]

_SMALL_BATCH = 48
"""Images per GPU. Launching the kernels of a ResNet-50 step takes 15 to 20 ms of host time; running them takes 13 ms at
32 images on an H100, and in proportion: derived, not measured yet (docs/performance.md)."""


def environment(runtime: Runtime, parts: Parts) -> dict[str, Any]:
    """Return the run's software, hardware and settings as values that JSON can hold."""
    on_gpu = runtime.device.type == "cuda"
    return {
        "command": [*sys.orig_argv],
        "moco_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(runtime.device) if on_gpu else _processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "loader": parts.loader.description,
        "num_samples": parts.loader.num_samples,
        "steps_per_epoch": len(parts.loader),
        "num_steps": parts.num_steps,
    }


def print_opening(
    config: Config, runtime: Runtime, parts: Parts, step: int, *, init_from: Mapping[str, Any] | None = None
) -> None:
    """Print what is about to run and what was decided on the user's behalf."""
    ranks = counted(runtime.world_size, "rank")
    steps = f"{counted(parts.num_steps, 'step')} of {config.data.batch_size}"
    _say(f"{config.model.encoder}, {ranks} on {runtime.device.type}, {steps}")
    samples, steps = counted(parts.loader.num_samples, "sample"), counted(len(parts.loader), "step")
    _say(f"data: {samples} in {config.data.shards}, {steps} per epoch")
    _say(describe_lr(config))
    _say(f"loader: {parts.loader.description}")
    for note in runtime.notes:
        _say(note)
    on_gpu = runtime.device.type == "cuda"
    # The launcher may also have requested compilation.
    if not runtime.compile and (note := advice_on_launches(config, on_gpu=on_gpu, world_size=runtime.world_size)):
        _say(note)
    policy = resolve_policy(config.bn)
    _say(f"batch norm: {policy}" + (f", {config.bn.num_groups} groups" if policy == "virtual" else ""))
    if config.optim.accumulate > 1:
        batches = f"{config.optim.accumulate} batches"
        _say(f"accumulation: {batches} per step, each with its own loss, so this is not one large batch")
    if init_from is not None:
        _say(f"started from {' and '.join(init_from['parts'])} of {init_from['name']}, digest {init_from['digest']}")
        print_notes(init_from["notes"])
    _say(describe(config.checkpoint))
    if step:
        _say(f"continuing {config.run.out} from step {step}")


def print_changes(changes: Changes) -> None:
    """Print what differs from the last start of the run."""
    for line in changes.allowed:
        _say(f"changed, as --run.allow-changes says: {line}")
    for line in changes.noted:
        _say(f"changed: {line}")


def print_notes(notes: Iterable[str]) -> None:
    """Print what was decided before the run's folder was touched."""
    for note in notes:
        _say(note)


def advice_on_launches(config: Config, *, on_gpu: bool, world_size: int) -> str | None:
    """Return advice if batches are so small that launching kernels takes longer than running them, else None."""
    per_gpu = config.data.batch_size // world_size
    if not on_gpu or per_gpu > _SMALL_BATCH or config.run.compile or config.run.cuda_graphs:
        return None
    one_backward = config.method.backward_passes * config.optim.accumulate == 1
    option = "--run.cuda-graphs" if one_backward else "--run.compile"
    return f"note: with {per_gpu} images per GPU, launching kernels takes longer than running them: try {option}"


def print_closing(
    config: Config, outcome: str, step: int, num_steps: int, *, best: Mapping[str, Any] | None = None
) -> None:
    """Print how the run ended and what to do next."""
    if best:
        _say(f"best {best['figure']}: {best['value']:.4g} at step {best['step']}, in {config.run.out}/checkpoints/best")
    if outcome == "stopped":
        _say(f"stopped and saved at step {step} of {num_steps}; the same command continues from there")
    else:
        _say(f"finished {counted(num_steps, 'step')}; encoder, metrics and configuration are in {config.run.out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
