"""When checkpoints are due: by steps, by time, or as often as costs least."""

import math
import time
from collections.abc import Callable

from moco_fast.config import CheckpointConfig
from shards.ground.units import counted, format_duration

__all__ = ["Due", "best_interval", "describe"]

_FIRST_S = 60.0
"""Time after which `auto` saves first, to know the cost."""


def best_interval(cost_s: float, between_failures_s: float) -> float:
    """Return the seconds between saves at which saving and repeating what failures undo cost least together.

    Daly 2006, "A higher order estimate of the optimum checkpoint interval", eq. 37, which refines Young 1974.

    Args:
        cost_s: time that training stands still for one save.
        between_failures_s: mean time between two failures of the whole run.
    """
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    share = cost_s / (2 * between_failures_s)
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + math.sqrt(share) / 3 + share / 9) - cost_s


class Due:
    """Says when checkpoints are due. By steps, every rank knows; by time, the first rank asks the others.

    Args:
        config: of checkpoints.
        clock: in seconds.
    """

    def __init__(self, config: CheckpointConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._saved_at = clock()
        self._is_auto = config.every == "auto"
        minutes = config.every_minutes
        self._interval_s = _FIRST_S if self._is_auto else math.inf if minutes is None else 60 * minutes
        self._is_measured = False

    def by_steps(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        every = self._config.every_steps
        return not self._is_auto and every is not None and step % every == 0

    def by_time(self) -> bool:
        """Whether one is due by this process's clock."""
        return self._clock() - self._saved_at >= self._interval_s

    def began(self) -> None:
        """Note that a save begins: the next one is due an interval from now."""
        self._saved_at = self._clock()

    def measured(self, *, cost_s: float, write_s: float) -> str | None:
        """Note what a save took.

        Args:
            cost_s: time that training stood still for it.
            write_s: time until it was on the disk.

        Returns:
            the interval of `auto` in words, once it is known; else None.
        """
        if not self._is_auto:
            return None
        # More often than one can be written, they would only wait for each other.
        self._interval_s = max(best_interval(cost_s, 3600 * self._config.failure_hours), write_s)
        if self._is_measured:
            return None
        self._is_measured = True
        return (
            f"checkpoints: every {format_duration(self._interval_s)}, since training stands still for {cost_s:.2g} s "
            f"at each, and one failure in {self._config.failure_hours:g} hours is expected (--checkpoint.failure-hours)"
        )


def describe(config: CheckpointConfig) -> str:
    """Return in words when checkpoints are due, and which of them are kept."""
    times = [] if config.every_steps is None else [f"every {counted(config.every_steps, 'step')}"]
    times += [] if config.every_minutes is None else [f"every {config.every_minutes:g} min"]
    when = " and ".join(times) or "at the end"
    if config.every == "auto":
        when = f"after {format_duration(_FIRST_S)}, then as often as its cost says (--checkpoint.every auto)"
    kept = [f"the newest {config.keep}"]
    kept += [] if config.keep_every is None else [f"one for every {counted(config.keep_every, 'step')}"]
    kept += [] if config.keep_best is None else [f"the best by {config.keep_best}"]
    where = "" if config.mirror is None else f"; also in {config.mirror}"
    return f"checkpoints: {when}; kept: {', '.join(kept)}{where}"
