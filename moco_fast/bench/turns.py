"""Measurements in turns: the loader, the step, and both together, in rounds on one loader and one step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from moco_fast.bench.clock import PartClock
from moco_fast.bench.names import REST, WAITING
from moco_fast.bench.stopwatch import Job, Stopwatch
from moco_fast.config import Config
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch
from pipelines.loader import Loader

__all__ = ["Round", "Turns"]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of one stage."""

    samples_per_s: float
    parts_s: dict[str, float] = field(default_factory=dict)
    """Seconds per part and step."""


class Turns:
    """Rounds of about `round_s` seconds each. A queue that has filled between rounds is emptied before the next one.

    Args:
        config: configuration of the run.
        stopwatch: stopwatch of the run's ranks.
        loader: loader of the run.
        step: training step with its parts timed by `clock`.
        clock: clock of the parts.
        resident: batches of one step, on the device.
        round_s: approximate seconds per round, which has at least one step.
    """

    def __init__(
        self,
        *,
        config: Config,
        stopwatch: Stopwatch,
        loader: Loader,
        step: TrainStep,
        clock: PartClock,
        resident: list[Batch],
        round_s: float,
    ):
        self._config, self._stopwatch, self._step, self._clock = config, stopwatch, step, clock
        self._batches = _endless(loader)
        self._most_ready = loader.most_ready
        self._resident = resident
        self._round_s = round_s
        self._num_calls: dict[str, int] = {}
        self._call_s: dict[str, float] = {}

    def loader(self) -> Round:
        """Measure taking batches and dropping them."""
        self._drain()
        return self._round("loader", self._take, self._round_s)

    def step(self) -> Round:
        """Measure training on the same batches repeatedly, while the loader's queue is full and the loader is idle."""

        def train() -> None:
            self._train(self._resident)

        if "step" not in self._num_calls:
            self._prepare("step", train, self._round_s)
        fill_s = self._most_ready * self._call_s.get("loader", 0.0) / self._config.optim.accumulate
        self._stopwatch.time(train, int(min(fill_s, self._round_s) / self._call_s["step"]))
        return self._round("step", train, self._round_s)

    def end_to_end(self) -> Round:
        """Measure training on the loader's batches."""

        def train_on_next() -> None:
            with self._clock.part(WAITING):
                batches = self._take()
            self._train(batches)

        loader_s, step_s = self._call_s.get("loader", 0.0), self._call_s.get("step", 0.0)
        if loader_s > step_s:
            self._drain()
        if loader_s and step_s:
            self._stopwatch.time(train_on_next, 1)
            self._num_calls["end_to_end"] = max(2, round(1.5 * self._round_s / max(loader_s, step_s)))
        # Longer than the other rounds: it takes some time until the slower of the two determines the rate.
        return self._round("end_to_end", train_on_next, 1.5 * self._round_s)

    @property
    def is_slow(self) -> bool:
        """Whether a step takes longer than a round should."""
        return self._call_s.get("step", 0.0) > self._round_s

    def _train(self, batches: list[Batch]) -> None:
        with self._clock.part(REST):
            # A learning rate of 0 keeps the weights, so that steps on noise do not change their own duration.
            self._step(batches, lr=0.0, scheduled=self._config.method.scheduled(0, 1))

    def _take(self) -> list[Batch]:
        return list(islice(self._batches, self._config.optim.accumulate))

    def _drain(self) -> None:
        self._stopwatch.time(lambda: next(self._batches), self._most_ready)

    def _prepare(self, name: str, job: Job, seconds: float) -> None:
        self._num_calls[name] = self._stopwatch.calls_for(job, seconds)
        self._call_s[name] = seconds / self._num_calls[name]

    def _round(self, name: str, job: Job, seconds: float) -> Round:
        if name not in self._num_calls:
            self._prepare(name, job, seconds)
        calls = self._num_calls[name]
        self._clock.read()
        took_s = self._stopwatch.time(job, calls)
        self._call_s[name] = took_s / calls
        samples = calls * self._config.data.batch_size * self._config.optim.accumulate
        parts_s = {part: of_all_s / calls for part, of_all_s in self._clock.read().items()}
        return Round(samples_per_s=samples / took_s, parts_s=parts_s)


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader
