"""Headspace: now and then, what loading data costs a step, and how much faster than the steps the loader could be.

Some batches are fetched ahead and held back; while they are used up, the loader, whose buffers are full, does nothing.
So the same steps are taken on the same batches in the same order, and nothing of the run changes; only when its batches
were fetched does. Steps on a repeated batch would have to be undone: weights, statistics, queue, optimizer, generators.
Waiting for data, which is logged anyway, does not show what a loader takes from the steps beside it: cores, memory, a
GPU.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch

from moco_fast.training.gauges import HostCpu, PendingTimes, StepClock
from moco_fast.training.supply import Supply

__all__ = ["Headspace", "PendingHeadspace", "describe"]

_NUM_TIMED = 8
"""Steps that are timed, of those beside the loader and of those without."""
_NUM_UNSETTLED = 4
"""Steps before them, during which the loader fills its buffers again; and batches fetched that were ready already."""
_MEMORY_SHARE = 0.5
"""Of a GPU's free memory that held batches may take."""


@dataclass(frozen=True, kw_only=True)
class PendingHeadspace:
    """A measurement whose steps the device may not have reached yet."""

    beside: PendingTimes
    alone: PendingTimes
    fetch_s: float
    """Of a step's batches, while no step is taken."""
    pause_s: float
    host_cpu_share: float | None

    def wait(self) -> dict[str, float]:
        """Return the values by their names in metrics.jsonl."""
        beside, alone = (median(times.seconds()) for times in (self.beside, self.alone))
        found = {
            "headspace/data_cost_share": 1 - alone / beside,
            "headspace/loader_ratio": alone / self.fetch_s,
            "headspace/step_s": alone,
            "headspace/pause_s": self.pause_s,
        }
        return found if self.host_cpu_share is None else {**found, "headspace/host_cpu_share": self.host_cpu_share}


class Headspace:
    """Measurement of steps without loading, every so many steps.

    Args:
        every_steps: steps between two measurements; None: there are none.
        batches_per_step: that a step takes.
        clock: of the run, that times every step.
        supply: of the run.
        device: of the run.
    """

    def __init__(
        self, every_steps: int | None, batches_per_step: int, clock: StepClock, supply: Supply, device: torch.device
    ):
        self._every_steps, self._batches_per_step = every_steps, batches_per_step
        self._clock, self._supply, self._device = clock, supply, device
        self._cpu = HostCpu()
        self._begun: tuple[PendingTimes, float, float, float | None] | None = None

    def after(self, step: int) -> PendingHeadspace | None:
        """Do what is due after so many steps, outside of their time: hold batches back, or end a measurement.

        Returns:
            a measurement that has ended.
        """
        if self._begun is not None and not self._supply.num_held:
            beside, fetch_s, pause_s, cpu = self._begun
            self._begun = None
            alone = self._clock.recent(_NUM_TIMED)
            return PendingHeadspace(beside=beside, alone=alone, fetch_s=fetch_s, pause_s=pause_s, host_cpu_share=cpu)
        if self._begun is None and self._every_steps is not None and step % self._every_steps == 0:
            self._hold()
        return None

    def _hold(self) -> None:
        beside, cpu = self._clock.recent(_NUM_TIMED), self._cpu.share()
        if len(beside) < _NUM_TIMED:
            return
        begin = time.perf_counter()
        seconds: list[float] = []
        for number in range(_NUM_UNSETTLED + _NUM_TIMED):
            before = time.perf_counter()
            for _ in range(self._batches_per_step):
                num_bytes = self._supply.hold()
                if not number and not self._fits(num_bytes):
                    return
            seconds.append(time.perf_counter() - before)
        fetch_s = sum(seconds[_NUM_UNSETTLED:]) / _NUM_TIMED
        self._begun = beside, fetch_s, time.perf_counter() - begin, cpu

    def _fits(self, num_bytes: int) -> bool:
        if self._device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self._device)[0]
        return num_bytes * self._batches_per_step * (_NUM_UNSETTLED + _NUM_TIMED) < _MEMORY_SHARE * free


def describe(line: dict[str, float]) -> str | None:
    """Say in a line what a line of metrics holds of a measurement; None: nothing."""
    if "headspace/data_cost_share" not in line:
        return None
    cost, ratio = max(0.0, line["headspace/data_cost_share"]), line["headspace/loader_ratio"]
    said = f"headspace: data costs {100 * cost:.0f}% of the step; alone, the loader is {ratio:.1f} times as fast as it"
    cpu = line.get("headspace/host_cpu_share")
    return said if cpu is None else f"{said}; host CPU at {100 * cpu:.0f}%"
