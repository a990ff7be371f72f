"""What limits this machine: the loader alone, the step alone, and both together, with the recipe and shards of a run.

moco-fast bench moco-v2 --data.shards DIR
accelerate launch --config_file configs/accelerate/gpu-8.yaml -m moco_fast.bench moco-v2 --data.shards DIR
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moco_fast.config import Config
from moco_fast.presets import PRESETS
from moco_fast.train import check, is_first_rank

if TYPE_CHECKING:
    import torch

    from moco_fast.build import Parts
    from moco_fast.runtime import Runtime
    from pipelines.batch import TwoViewBatch

__all__ = ["BenchConfig", "BenchResult", "Rate", "main", "measure", "verdict"]

if TYPE_CHECKING:
    Recipe = Config
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: preset for name, (_, preset) in PRESETS.items()},
        {name: line for name, (line, _) in PRESETS.items()},
        prefix_names=False,
    )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure what limits a run: reading and decoding, or training."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    seconds: float = 5.0
    """Seconds a round; there are three rounds of each measurement, in turn."""
    json: str | None = None
    """File that the figures are also written to."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Samples/s over all ranks, of three rounds."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured, and where."""

    loader: Rate
    """Batches taken from the loader and dropped."""
    step: Rate
    """Steps on one batch, over and over."""
    end_to_end: Rate
    """Steps on the loader's batches."""
    data_wait_share: float
    """Share of the end-to-end time spent waiting for a batch."""
    torch_peak_bytes: int | None
    """Most memory that torch held on this rank's GPU, if there is one."""
    device_used_bytes: int | None
    """Memory in use on this rank's GPU, DALI's and all else included."""
    environment: dict[str, Any]

    @property
    def overlap(self) -> float:
        """End to end over the slower of its two halves: 1 if loading and training hide each other fully."""
        return self.end_to_end.median / min(self.loader.median, self.step.median)


def measure(config: Config, *, seconds: float) -> BenchResult:
    """Measure a recipe on this machine; under several processes, all of them call this.

    Args:
        config: the recipe; nothing is written to `run.out`.
        seconds: of each of the nine rounds.

    Raises:
        ValueError: the recipe does not fit the data or the machine.
    """
    from moco_fast import console
    from moco_fast.build import build
    from moco_fast.runtime import start

    runtime = start(config.run, accumulate=config.optim.accumulate)
    try:
        parts = build(config, runtime)
        try:
            figures = _Stopwatch(config, runtime, parts, seconds).measure()
            return BenchResult(**figures, environment=console.environment(runtime, parts))
        finally:
            parts.loader.close()
    finally:
        runtime.close()


class _Stopwatch:
    def __init__(self, config: Config, runtime: "Runtime", parts: "Parts", seconds: float):
        self._config, self._runtime, self._parts, self._seconds = config, runtime, parts, seconds
        self._batches = self._endless()
        self._wait_s = 0.0

    def measure(self) -> dict[str, Any]:
        resident = self._take()
        jobs: dict[str, Callable[[], object]] = {
            "loader": self._take,
            "step": lambda: self._train(resident),
            "end_to_end": lambda: self._train(self._take()),
        }
        steps = {name: self._steps_for(job) for name, job in jobs.items()}
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        waits: list[float] = []
        for _ in range(3):
            for name, job in jobs.items():
                self._wait_s = 0.0
                elapsed_s = self._time(job, steps[name])
                rates[name].append(steps[name] * self._config.data.batch_size * len(resident) / elapsed_s)
                if name == "end_to_end":
                    waits.append(self._wait_s / elapsed_s)
        found = {name: Rate(median=median(r), lowest=min(r), highest=max(r)) for name, r in rates.items()}
        return {**found, "data_wait_share": median(waits), **_memory(self._runtime.device)}

    def _endless(self) -> "Iterator[TwoViewBatch]":
        while True:
            yield from self._parts.loader

    def _take(self) -> "list[TwoViewBatch]":
        started = time.perf_counter()
        batches = list(islice(self._batches, self._config.optim.accumulate))
        self._wait_s += time.perf_counter() - started
        return batches

    def _train(self, batches: "list[TwoViewBatch]") -> None:
        self._parts.train_step(batches, lr=self._config.optim.lr, momentum=self._config.moco.momentum)

    def _steps_for(self, job: Callable[[], object]) -> int:
        """Warm up, then return how many steps fill a round, the same on every rank."""
        self._time(job, 3)
        step_s = self._time(job, 2) / 2
        return self._runtime.tell_all(max(2, round(self._seconds / step_s)))

    def _time(self, job: Callable[[], object], steps: int) -> float:
        self._runtime.wait_for_all()
        _wait_for_device(self._runtime.device)
        started = time.perf_counter()
        for _ in range(steps):
            job()
        _wait_for_device(self._runtime.device)
        self._runtime.wait_for_all()
        return time.perf_counter() - started


def verdict(result: BenchResult) -> str:
    """Say in a sentence what limits the run, and what to do about it."""
    ratio = result.loader.median / result.step.median
    found = (
        f"The loader delivers {ratio:.1f}x what the step consumes, and end to end runs at {result.overlap:.0%} of the "
        "slower one: "
    )
    if result.torch_peak_bytes is None:
        return found + "on a CPU both share the cores, so less than the slower one alone is what to expect."
    if ratio < 1.0:
        return found + (
            "bound by the loader. Pack with `make-shards pack --resize` if the images are much larger than the views, "
            "or give each rank more CPUs."
        )
    if result.overlap < 0.97:
        return found + (
            "loader and step get in each other's way. Look at CPU affinity, --data.num-threads and --data.prefetch."
        )
    if ratio < 1.3:
        return found + "bound by the GPU, with little to spare in the loader: watch data_wait_share in the run."
    return found + "bound by the GPU, as it should be."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit code."""
    config = tyro.cli(BenchConfig, prog="moco-fast bench", args=argv, console_outputs=is_first_rank())
    try:
        check(config.recipe)
        if config.seconds <= 0:
            raise ValueError(f"--seconds is {config.seconds}, but a round takes some time: give a number above 0")
        result = measure(config.recipe, seconds=config.seconds)
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr)
        return 2
    if is_first_rank():
        print(_table(result))
        if config.json:
            Path(config.json).write_text(json.dumps(asdict(result) | {"verdict": verdict(result)}, indent=2) + "\n")
    return 0


def _table(result: BenchResult) -> str:
    where = result.environment
    ranks = f"{where['world_size']} ranks" if where["world_size"] > 1 else "1 rank"
    lines = [
        f"{where['device']}, {ranks}, {where['precision']}; loader: {where['loader']}",
        "",
        f"{'samples/s (two views each)':<28}{'median':>10}{'lowest':>10}{'highest':>10}",
    ]
    rows = {"loader alone": result.loader, "step alone": result.step, "end to end": result.end_to_end}
    for name, rate in rows.items():
        lines.append(f"{name:<28}{rate.median:>10,.0f}{rate.lowest:>10,.0f}{rate.highest:>10,.0f}")
    lines.append(f"{'waiting for data, end to end':<28}{result.data_wait_share:>10.1%}")
    if result.torch_peak_bytes is not None and result.device_used_bytes is not None:
        peak_gib, used_gib = (count / (1 << 30) for count in (result.torch_peak_bytes, result.device_used_bytes))
        lines.append(f"GPU memory: torch's peak {peak_gib:.1f} GiB, in use {used_gib:.1f} GiB")
    return "\n".join([*lines, "", verdict(result)])


def _wait_for_device(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: "torch.device") -> dict[str, int | None]:
    import torch

    if device.type != "cuda":
        return {"torch_peak_bytes": None, "device_used_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    return {"torch_peak_bytes": torch.cuda.max_memory_allocated(device), "device_used_bytes": total - free}


if __name__ == "__main__":
    sys.exit(main())
