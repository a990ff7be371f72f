"""Progress of work in steps: a bar on a terminal, elsewhere a line every half minute."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from shards.ground.units import format_duration

__all__ = ["StepProgress"]


class StepProgress:
    """How far the steps of one or several trainings are, with what they say of themselves, and the time left.

    Args:
        num_steps: of all trainings.
        shown: whether this process shows it.
        interval_s: seconds between two lines where standard error is not a terminal.
        clock: gives seconds.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        shown: bool,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps, self._shown = num_steps, shown
        self._interval_s, self._clock = interval_s, clock
        self._step = self._num_taken = 0
        self._begin_s = self._said_s = clock()
        self._title = self._words = ""
        self._bar = tqdm(
            total=num_steps, unit="step", disable=not (shown and sys.stderr.isatty()), delay=3, mininterval=0.5
        )

    def begin(self, title: str) -> None:
        """Begin a training."""
        self._title, self._words = title, ""
        self._bar.set_description(title, refresh=False)

    def skip(self, num_steps: int) -> None:
        """Count steps that were taken before; they say nothing of the pace."""
        self._step += num_steps
        if not self._bar.disable:
            self._bar.initial += num_steps
            self._bar.n += num_steps
            self._bar.last_print_n += num_steps

    def note(self, words: str) -> None:
        """Say something of the training from now on, such as its loss."""
        self._words = words
        self._bar.set_postfix_str(words, refresh=False)

    def step(self) -> None:
        """Count a step."""
        self._step += 1
        self._num_taken += 1
        self._bar.update()
        if self._shown and self._bar.disable and self._clock() - self._said_s >= self._interval_s:
            self._said_s = self._clock()
            self.say(self._line())

    def _line(self) -> str:
        per_s = self._num_taken / max(self._said_s - self._begin_s, 1e-9)
        left_s = (self._num_steps - self._step) / per_s
        rate = f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"
        parts = [self._words, f"{rate} steps/s", f"{format_duration(left_s)} left"]
        return f"{self._title}: step {self._step:,} of {self._num_steps:,}: {', '.join(filter(None, parts))}"

    def say(self, line: str) -> None:
        """Print a line; a bar stays below it."""
        if self._shown:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """End it."""
        self._bar.close()
