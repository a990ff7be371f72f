"""Gauges of a run: what a step takes, of time, memory, host and device. Nothing here waits for the device.

On a GPU steps are timed by events on the training stream, which are read one interval later.
"""

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shards.ground.cpus import available_cpus

__all__ = ["Gauges", "HostCpu", "PendingGauges", "PendingTimes", "StepClock"]

_CGROUP = Path("/sys/fs/cgroup")
_STAT = Path("/proc/stat")
_NUM_RECENT = 8
# Begin and end.
_Step = tuple[float | torch.cuda.Event, float | torch.cuda.Event]


class StepClock:
    """Times of single steps, as the device sees them, without waiting for it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._begin: float | torch.cuda.Event | None = None
        self._steps: list[_Step] = []
        self._recent: deque[_Step] = deque(maxlen=_NUM_RECENT)

    def begin(self) -> None:
        """Begin a step, before it waits for its batches."""
        self._begin = self._now()

    def end(self) -> None:
        """End it."""
        assert self._begin is not None, "no step was begun"
        step = self._begin, self._now()
        self._steps.append(step)
        self._recent.append(step)
        self._begin = None

    def take(self) -> "PendingTimes":
        """Return the steps since the last call."""
        taken, self._steps = self._steps, []
        return PendingTimes(taken)

    def recent(self, count: int) -> "PendingTimes":
        """Return the last steps, at most `count`, whether they were taken or not."""
        assert count <= _NUM_RECENT
        return PendingTimes(list(self._recent)[-count:])

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass(frozen=True)
class PendingTimes:
    """Steps whose events the device may not have reached yet."""

    _steps: "Sequence[_Step]" = ()

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def seconds(self) -> list[float]:
        """Return the seconds of each step; waits for the device to reach the end of the last one."""
        found: list[float] = []
        for begin, end in reversed(self._steps):
            if isinstance(end, torch.cuda.Event):
                assert isinstance(begin, torch.cuda.Event)
                end.synchronize()
                found.append(begin.elapsed_time(end) / 1e3)
            else:
                assert not isinstance(begin, torch.cuda.Event)
                found.append(end - begin)
        return found[::-1]


class HostCpu:
    """Share of the CPUs that this process may use that is busy, by whomever, since the last reading.

    Under a quota of a cgroup (a container's CPU limit): what its processes used of that. Else the kernel's counts of
    the CPUs in this process's affinity, where other processes of the machine show, too: they take from the loader.
    """

    def __init__(self, *, cgroup: Path = _CGROUP, stat: Path = _STAT):
        self._cgroup, self._stat = cgroup, stat
        allowed = os.sched_getaffinity(0)
        self._names = frozenset(f"cpu{number}" for number in allowed)
        quota = available_cpus(cgroup=cgroup)
        self._limited_to = quota if quota < len(allowed) and (cgroup / "cpu.stat").is_file() else None
        self._before = self._read()

    def share(self) -> float | None:
        """Return busy / available since the last call; None: the kernel does not tell, or no time has passed."""
        before, now = self._before, self._read()
        if before is None or now is None or now[1] <= before[1]:
            return None
        self._before = now
        return min(1.0, max(0.0, (now[0] - before[0]) / (now[1] - before[1])))

    def _read(self) -> tuple[float, float] | None:
        """Return busy and available time until now, in a unit of their own."""
        try:
            if self._limited_to is not None:
                used_us = re.search(r"^usage_usec (\d+)", (self._cgroup / "cpu.stat").read_text(), re.MULTILINE)
                return None if used_us is None else (int(used_us[1]) / 1e6, time.monotonic() * self._limited_to)
            return self._ticks()
        except OSError:
            return None

    def _ticks(self) -> tuple[float, float] | None:
        busy = total = 0
        for line in self._stat.read_text().splitlines():
            name, *fields = line.split()
            if name in self._names:
                # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user already.
                ticks = [int(field) for field in fields[:8]]
                total += sum(ticks)
                busy += sum(ticks) - sum(ticks[3:5])
        return (busy, total) if total else None


@dataclass(frozen=True, kw_only=True)
class PendingGauges:
    """Gauges of an interval, some of which the device may not have reached yet."""

    ready: dict[str, float]
    times: PendingTimes
    most_steps_per_s: float | None
    """Steps per second, if the device did nothing but the encoders' products at its peak; None: not known."""

    def wait(self) -> dict[str, float]:
        """Return the values by their names in metrics.jsonl."""
        seconds = self.times.seconds()
        found = dict(self.ready)
        if seconds:
            for name, quantile in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                found[f"step_s_{name}"] = float(np.quantile(seconds, quantile))
            if self.most_steps_per_s is not None:
                found["mfu"] = len(seconds) / sum(seconds) / self.most_steps_per_s
        return found


class Gauges:
    """What is gauged besides the method's values; each rank has its own, the first one's are logged.

    Args:
        device: of the run.
        num_steps: of the whole run.
        flops: floating-point operations of a rank's step, and what the device can do of them in a second; None: one of
            them is not known, so there is no utilization.
    """

    def __init__(self, device: torch.device, *, num_steps: int, flops: tuple[float, float] | None = None):
        self.clock = StepClock(device)
        self._device = device
        self._num_steps = num_steps
        self._most = None if flops is None else flops[1] / flops[0]
        self._cpu = HostCpu()
        self._begin: tuple[float, int] | None = None

    def take(self, step: int) -> PendingGauges:
        """Return the gauges of the interval that ends after so many steps."""
        return PendingGauges(ready=dict(self._read_now(step)), times=self.clock.take(), most_steps_per_s=self._most)

    def _read_now(self, step: int) -> Iterator[tuple[str, float]]:
        now = time.monotonic()
        if self._begin is None:
            # What compiles or fills a cache is not repeated.
            self._begin = now, step
        elif step > self._begin[1]:
            # By the clock on the wall: evaluations and savings go on, too.
            yield "time_left_s", (self._num_steps - step) * (now - self._begin[0]) / (step - self._begin[1])
        share = self._cpu.share()
        if share is not None:
            yield "host_cpu_share", share
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            yield "gpu_memory_used_gib", (total - free) / 2**30
            yield "gpu_memory_peak_gib", torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
