"""Times jobs that all ranks do together."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco_fast.training.runtime import Runtime

__all__ = ["Stopwatch"]

Job = Callable[[], object]


@dataclass(frozen=True)
class Stopwatch:
    """Every rank calls the same methods in the same order, and gets the same answers."""

    runtime: Runtime

    def time(self, job: Job, calls: int) -> float:
        """Seconds that so many calls take, until all ranks and their devices are done."""
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            job()
        self._wait()
        return self.runtime.tell_all(time.perf_counter() - started)

    def calls_for(self, job: Job, seconds: float) -> int:
        """How many calls take so long, at least one. The first call is to warm up: it may compile for a minute."""
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
