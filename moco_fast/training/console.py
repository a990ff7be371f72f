"""Messages of a run on the terminal, and the description of its environment."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moco_fast import __version__
from moco_fast.config import Config
from moco_fast.methods.shuffle import resolve_policy
from moco_fast.saving.due import describe
from moco_fast.training.alarms import describe_queue
from moco_fast.training.build import Parts
from moco_fast.training.continuing import Changes
from moco_fast.training.runtime import Runtime
from moco_fast.training.schedule import describe_lr
from shards.ground.units import counted, format_duration

__all__ = [
    "ProgressLine",
    "advice_on_speed",
    "environment",
    "print_changes",
    "print_closing",
    "print_notes",
    "print_opening",
    "say",
]

SMALL_BATCH = 64
"""Images per GPU. Launching the kernels of a ResNet-50 step takes 26 to 37 ms of host time; running them takes 13.5 ms
at 32 images on an H200, and in proportion (benchmarks/results/2026-11-26-H200.md)."""


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
    say(f"{config.model.encoder}, {ranks} on {runtime.device.type}, {steps}")
    samples, steps = counted(parts.loader.num_samples, "sample"), counted(len(parts.loader), "step")
    say(f"data: {samples} in {config.data.shards}, {steps} per epoch")
    say(describe_lr(config))
    say(f"loader: {parts.loader.description}")
    for note in runtime.notes:
        say(note)
    on_gpu = runtime.device.type == "cuda"
    # The launcher may also have requested compilation.
    if not runtime.compile and (note := advice_on_speed(config, on_gpu=on_gpu, world_size=runtime.world_size)):
        say(note)
    policy = resolve_policy(config.bn)
    say(f"batch norm: {policy}" + (f", {config.bn.num_groups} groups" if policy == "virtual" else ""))
    if said := describe_queue(config, parts.num_steps):
        say(said)
    if config.optim.accumulate > 1:
        batches = f"{config.optim.accumulate} batches"
        say(f"accumulation: {batches} per step, each with its own loss, so this is not one large batch")
    if init_from is not None:
        say(f"started from {' and '.join(init_from['parts'])} of {init_from['name']}, digest {init_from['digest']}")
        print_notes(init_from["notes"])
    say(describe(config.checkpoint))
    if step:
        say(f"continuing {config.run.out} from step {step}")


def print_changes(changes: Changes) -> None:
    """Print what differs from the last start of the run."""
    for line in changes.allowed:
        say(f"changed, as --run.allow-changes says: {line}")
    for line in changes.noted:
        say(f"changed: {line}")


def print_notes(notes: Iterable[str]) -> None:
    """Print what was decided before the run's folder was touched."""
    for note in notes:
        say(note)


def advice_on_speed(config: Config, *, on_gpu: bool, world_size: int) -> str | None:
    """Return the option that makes a GPU's step faster, and why; None where it is set, or there is no GPU."""
    if not on_gpu or config.run.compile or config.run.cuda_graphs:
        return None
    per_gpu = config.data.batch_size // world_size
    if per_gpu > SMALL_BATCH:
        return (
            "note: --run.compile makes convolutional encoders faster (ResNet-50's step on an H200: 1.6 times), after "
            "about a minute of compiling at the first start"
        )
    one_backward = config.method.backward_passes * config.optim.accumulate == 1
    option = "--run.cuda-graphs" if one_backward else "--run.compile"
    return f"note: with {per_gpu} images per GPU, launching kernels takes longer than running them: try {option}"


def print_closing(
    config: Config, outcome: str, step: int, num_steps: int, *, best: Mapping[str, Any] | None = None
) -> None:
    """Print how the run ended and what to do next."""
    if best:
        say(f"best {best['figure']}: {best['value']:.4g} at step {best['step']}, in {config.run.out}/checkpoints/best")
    if outcome == "stopped":
        say(f"stopped and saved at step {step} of {num_steps}; the same command continues from there")
    else:
        say(f"finished {counted(num_steps, 'step')}; encoder, metrics and configuration are in {config.run.out}")


def say(line: str) -> None:
    """Print a line of the run; a progress bar stays below it."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class ProgressLine:
    """Progress of a run: a bar on a terminal, else a line for each interval, without control characters.

    Args:
        num_steps: of the whole run.
        step: that it begins with.
        shown: whether this process shows it.
    """

    def __init__(self, num_steps: int, step: int, *, shown: bool):
        self._num_steps, self._shown = num_steps, shown
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, initial=step, unit="step", desc="train", disable=not on_terminal, mininterval=0.5
        )

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def interval(self, line: Mapping[str, float]) -> None:
        """Show a line of metrics."""
        words = [f"loss {line['loss']:.3f}", f"{line['samples_per_s']:,.0f} samples/s"]
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
        elif self._shown:
            words.append(f"{100 * line['data_wait_share']:.0f}% waiting for data")
            if (left_s := line.get("time_left_s")) is not None:
                words.append(f"{format_duration(left_s)} left")
            say(f"step {line['step']:,} of {self._num_steps:,}: {', '.join(words)}")

    def unpause(self) -> None:
        """Leave the time since the last step out of the bar's pace."""
        self._bar.unpause()

    def close(self) -> None:
        """End it."""
        self._bar.close()


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
