"""Start-up of a run: where the seconds between the command and the end of the first step go."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moco_fast.training.process import command_of, is_launcher

__all__ = ["StartUp"]


class StartUp:
    """Clock of a start, from the command to the first step.

    Args:
        ages: what came before this clock, with the seconds since it began, oldest first.
        clock: seconds that only grow.

        start_up = StartUp()
        start_up.lap("sets and model")
        start_up.describe("ready")    # 'start-up: ready after 0.8 s (sets and model 0.8)'
    """

    def __init__(self, ages: Mapping[str, float] | None = None, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        now = clock()
        begins = [(what, now - age) for what, age in (ages or {}).items()]
        self._began = self._last = now
        self._spent: dict[str, float] = {}
        if begins:
            self._began = begins[0][1]
            ends = [*(begin for _, begin in begins[1:]), now]
            self._spent = {what: max(0.0, end - begin) for (what, begin), end in zip(begins, ends, strict=True)}

    @classmethod
    def of_command(cls, env: Mapping[str, str] = os.environ) -> "StartUp":
        """Return the clock of this process's command, whose imports are done; with its launcher's if that started it.

        A launcher that starts its ranks again has been running for long, and is left out.
        """
        own = _age(os.getpid())
        if own is None:
            return cls()
        launcher = os.getppid()
        is_first = env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        age = _age(launcher) if is_first and is_launcher(command_of(launcher)) else None
        return cls({"imports": own} if age is None else {"launcher": age, "imports": own})

    def lap(self, what: str) -> None:
        """Count the time since the last lap as spent on `what`."""
        now = self._clock()
        self._spent[what] = self._spent.get(what, 0.0) + now - self._last
        self._last = now

    def describe(self, reached: str) -> str:
        """Return one line: after how many seconds something was reached, and what they were spent on."""
        parts = ", ".join(f"{what} {spent:.1f}" for what, spent in self._spent.items())
        return f"start-up: {reached} after {self._last - self._began:.1f} s ({parts})"


def _age(pid: int) -> float | None:
    """Return the seconds since a process was started; None: the system does not say (proc_pid_stat(5), field 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
