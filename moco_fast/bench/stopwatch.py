"""Stopwatch for jobs that all ranks run together."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco_fast.training.runtime import Runtime

__all__ = ["Stopwatch"]

Job = Callable[[], object]


@dataclass(frozen=True)
class Stopwatch:
    """Stopwatch whose methods every rank calls in the same order, with the same results."""

    runtime: Runtime

    def time(self, job: Job, calls: int) -> float:
        """Return the seconds that `calls` calls take, until all ranks and their devices have finished."""
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            job()
        self._wait()
        return self.runtime.tell_all(time.perf_counter() - started)

    def calls_for(self, job: Job, seconds: float) -> int:
        """Return how many calls take `seconds`, at least 1. The first is a warm-up: it may compile for a minute."""
        self.time(job, 1)
        calls, took_s = 1, self.time(job, 1)
        while took_s < seconds / 10:
            calls *= 2
            took_s = self.time(job, calls)
        return max(1, round(seconds * calls / took_s))

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        self.runtime.wait_for_all()
