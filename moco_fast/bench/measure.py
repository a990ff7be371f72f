"""Measurements of a recipe, stage by stage, on every rank."""

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, get_args

import torch

from moco_fast.bench.clock import PartClock
from moco_fast.bench.loading import can_read, decoding, made_on_device, reading, resident_batch
from moco_fast.bench.parts import on_a_clock
from moco_fast.bench.result import BenchResult, Rate
from moco_fast.bench.stopwatch import Job, Stopwatch
from moco_fast.bench.turns import Round, Turns
from moco_fast.config import Config
from moco_fast.methods.shuffle import resolve_policy
from moco_fast.training import console
from moco_fast.training.build import Parts, build, open_run_loader, open_sets
from moco_fast.training.runtime import Runtime, start
from pipelines.loader import Loader
from shards.sets import ShardSet

__all__ = ["STAGES", "Stage", "measure"]

Stage = Literal["reading", "decoding", "loader", "step", "end_to_end"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_ROUNDS = 3
# Rounds are long where loader and step must reach a steady rate, and short where one operation is repeated.
_SHARES: dict[Stage, float] = {"reading": 0.5, "decoding": 0.5, "loader": 1.0, "step": 1.0, "end_to_end": 1.5}


def measure(
    config: Config,
    *,
    seconds: float,
    stages: Collection[Stage] = STAGES,
    tell: Callable[[str], object] = lambda _: None,
) -> BenchResult:
    """Measure a recipe on this machine; if there are several processes, all of them call this.

    On a CPU, smaller batches are measured where a step of the whole batch would take too long.

    Args:
        config: the recipe; nothing is written to `run.out`.
        seconds: approximate seconds of measuring, not including start, warm-up and compilation.
        stages: stages to measure.
        tell: called with a few words about the current stage.

    Raises:
        ValueError: the recipe does not fit the data or the machine.
    """
    runtime = start(config.run)
    try:
        shards = open_sets(config).training
        parts = build(config, runtime, shards)
        parts.loader.close()
        round_s = seconds / (_ROUNDS * sum(_SHARES[stage] for stage in stages))
        stopwatch = Stopwatch(runtime)
        fitted = config
        if "step" in stages and runtime.device.type == "cpu":
            tell("trying a step")
            fitted = _fit_batch(config, parts, stopwatch, round_s / 2)
        bench = _Bench(config=fitted, shards=shards, parts=parts, stopwatch=stopwatch, round_s=round_s)
        found: dict[str, Any] = {}
        if "reading" in stages and can_read(shards):
            tell("reading")
            found |= bench.reading(shards)
        if "decoding" in stages and can_read(shards):
            tell("decoding")
            found |= bench.decoding(shards)
        with closing(open_run_loader(fitted, runtime, shards)) as loader:
            in_turns = [stage for stage in STAGES[2:] if stage in stages]
            tell(", ".join(in_turns).replace("_", " "))
            found |= bench.in_turns(in_turns, loader)
            found |= _memory(runtime.device)
            environment = console.environment(runtime, replace(parts, loader=loader))
            view_sizes = [view.size for view in config.method.views_of(config.views)]
        return BenchResult(
            **found,
            batch_size=fitted.data.batch_size,
            recipe_batch_size=config.data.batch_size,
            environment=environment | {"encoder": config.model.encoder, "view_sizes": view_sizes},
        )
    finally:
        runtime.close()


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """State that the stages share. Each stage returns fields of BenchResult."""

    config: Config
    shards: ShardSet | None
    """The training set; None: tars that are streamed."""
    parts: Parts
    stopwatch: Stopwatch
    round_s: float

    def reading(self, shards: ShardSet) -> dict[str, Any]:
        num_bytes = num_batches = 0
        with reading(self.config, self._runtime, shards) as batches:

            def read() -> None:
                nonlocal num_bytes, num_batches
                num_bytes += next(batches)
                num_batches += 1

            ahead = self.config.data.prefetch + 1
            rate = self._rate(read, _SHARES["reading"] * self.round_s, ahead=ahead)
        bytes_a_sample = num_bytes / (num_batches * (self.config.data.batch_size // self._runtime.world_size))
        return {"reading": rate, "read_bytes_per_s": self._runtime.tell_all(bytes_a_sample) * rate.median}

    def decoding(self, shards: ShardSet) -> dict[str, Any]:
        with closing(decoding(self.config, self._runtime, shards)) as loader:
            batches = (batch for _ in iter(int, 1) for batch in loader)
            seconds = _SHARES["decoding"] * self.round_s
            return {"decoding": self._rate(lambda: next(batches), seconds, ahead=loader.most_ready)}

    def in_turns(self, stages: Collection[str], loader: Loader) -> dict[str, Any]:
        """Measure the loader, the step and both in turns, so that disturbances affect all of them equally."""
        clock = PartClock(self._runtime.device)
        size = self.config.data.batch_size // self._runtime.world_size
        resident = [resident_batch(self.config, self._runtime, size, self._runtime.device)]
        rounds: dict[str, list[Round]] = {stage: [] for stage in stages}
        with on_a_clock(self.parts.train_step, self.parts.optimizer, clock) as step:
            turns = Turns(
                config=self.config,
                stopwatch=self.stopwatch,
                loader=loader,
                step=step,
                clock=clock,
                resident=resident * self.config.optim.accumulate,
                round_s=self.round_s,
            )
            for _ in range(_ROUNDS):
                for stage, done in rounds.items():
                    done.append(getattr(turns, stage)())
                # If a step takes longer than a round should, there is time for one round only.
                if turns.is_slow:
                    break
        found: dict[str, Any] = {stage: Rate.of([one.samples_per_s for one in done]) for stage, done in rounds.items()}
        found["parts_alone_s"] = _medians(rounds.get("step", []))
        found["parts_end_to_end_s"] = _medians(rounds.get("end_to_end", []))
        if "loader" in rounds and not made_on_device(self.config, self._runtime.device, self.shards):
            found["hand_over"] = self._hand_over(size)
        return found

    def _hand_over(self, size: int) -> Rate:
        batch = resident_batch(self.config, self._runtime, size, torch.device("cpu"))
        device = self._runtime.device
        return self._rate(lambda: [view.to(device) for view in batch.views], 0.1 * self.round_s, ahead=1)

    def _rate(self, job: Job, seconds: float, *, ahead: int) -> Rate:
        """Return the rate over rounds of a job that processes one batch; `ahead` of them, made before, do not count."""
        self.stopwatch.time(job, ahead)
        calls = self.stopwatch.calls_for(job, seconds)
        return Rate.of([calls * self.config.data.batch_size / self.stopwatch.time(job, calls) for _ in range(_ROUNDS)])

    @property
    def _runtime(self) -> Runtime:
        return self.stopwatch.runtime


def _fit_batch(config: Config, parts: Parts, stopwatch: Stopwatch, step_s: float) -> Config:
    """Reduce the batch until a step takes about `step_s` at most, as far as the batch-norm policy allows."""
    runtime = stopwatch.runtime
    sizes = _smaller_batches(config, runtime.world_size)
    probe = [resident_batch(config, runtime, sizes[-1] // runtime.world_size, runtime.device)] * config.optim.accumulate

    def step() -> None:
        parts.train_step(probe, lr=0.0, scheduled=config.method.scheduled(0, parts.num_steps))

    took_s = stopwatch.time(step, 1)
    if took_s < step_s:
        took_s = stopwatch.time(step, 1)
    fitting = [size for size in sizes if size * took_s / sizes[-1] <= step_s]
    return replace(config, data=replace(config.data, batch_size=fitting[0] if fitting else sizes[-1]))


def _smaller_batches(config: Config, world_size: int) -> list[int]:
    """Return the recipe's global batch and its halves, as far as every rank can compute its share, largest first.

    Down to 8 samples per rank: with fewer, the encoders no longer dominate the time.
    """
    policy = resolve_policy(config.bn)
    groups = {"virtual": config.bn.num_groups, "exchange": world_size}.get(policy, 1)
    least = world_size * max(8, 2 * groups)
    sizes = [config.data.batch_size]
    while sizes[-1] % (2 * world_size * groups) == 0 and sizes[-1] >= 2 * least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _medians(rounds: list[Round]) -> dict[str, float]:
    names = dict.fromkeys(name for one in rounds for name in one.parts_s)
    return {name: median(one.parts_s.get(name, 0.0) for one in rounds) for name in names}


def _memory(device: torch.device) -> dict[str, int | None]:
    if device.type != "cuda":
        return {"torch_peak_bytes": None, "device_used_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    return {"torch_peak_bytes": torch.cuda.max_memory_allocated(device), "device_used_bytes": total - free}
