"""Progress of long work: a bar on a terminal, elsewhere a line now and then; and lines beside them."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

from shards.ground.units import format_bytes, format_duration

__all__ = ["ProgressBars", "Tick"]

_INTERVAL_S = 30.0


class Tick(Protocol):
    """Called with what was done since the last call."""

    def __call__(self, count: int, num_bytes: int = 0, /) -> object:
        """Note a number of units, and the bytes that they came to."""
        ...


class ProgressBars:
    """Shows how far each stage of the work is: units and bytes, their rate, the time left.

    Args:
        enabled: False shows nothing.
        interval_s: seconds between two lines where standard error is not a terminal.
        clock: gives seconds.
    """

    def __init__(
        self, *, enabled: bool = True, interval_s: float = _INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._enabled = enabled
        self._interval_s = interval_s
        self._clock = clock

    @contextmanager
    def stage(
        self, title: str, *, unit: str, total: int | None = None, done: int = 0, done_bytes: int = 0
    ) -> Generator[Tick]:
        """Show one stage; what it gives is called with what was done.

        Args:
            title: what is being done.
            unit: what is counted, with a space before it.
            total: units in the end; None: not known.
            done: units that were done before.
            done_bytes: bytes that these came to.
        """
        if not self._enabled:
            yield _nothing
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(desc=title, unit=unit, total=total, initial=done, unit_scale=True, dynamic_ncols=True) as bar:
                so_far = _SoFar(self._clock, done, done_bytes)

                def advance(count: int, num_bytes: int = 0, /) -> None:
                    so_far.add(count, num_bytes)
                    if so_far.num_bytes:
                        bar.set_postfix_str(so_far.bytes_text(), refresh=False)
                    bar.update(count)

                yield advance
        else:
            lines = _Lines(title, unit.strip(), total, _SoFar(self._clock, done, done_bytes), self._interval_s)
            yield lines
            lines.end()

    def say(self, text: str) -> None:
        """Print a line beside the bars."""
        if self._enabled:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)


class _SoFar:
    """What was done, in which time."""

    def __init__(self, clock: Callable[[], float], count: int, num_bytes: int) -> None:
        self._clock = clock
        self._begin_s = clock()
        self._before = count, num_bytes
        self.count, self.num_bytes = count, num_bytes

    def add(self, count: int, num_bytes: int) -> None:
        self.count += count
        self.num_bytes += num_bytes

    @property
    def seconds(self) -> float:
        return self._clock() - self._begin_s

    @property
    def per_s(self) -> float:
        """Units per second; what was done before took no time here."""
        return (self.count - self._before[0]) / max(self.seconds, 1e-9)

    def bytes_text(self) -> str:
        rate = (self.num_bytes - self._before[1]) / max(self.seconds, 1e-9)
        return f"{format_bytes(self.num_bytes)}, {format_bytes(rate)}/s"


class _Lines:
    """Prints a line when a while has passed since the last one: what a log shows of a stage."""

    def __init__(self, title: str, unit: str, total: int | None, so_far: _SoFar, interval_s: float) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._so_far = so_far
        self._interval_s = interval_s
        self._num_printed = 0

    def __call__(self, count: int, num_bytes: int = 0, /) -> None:
        self._so_far.add(count, num_bytes)
        seconds = self._so_far.seconds
        if seconds >= (self._num_printed + 1) * self._interval_s:
            # Intervals in which nothing came are not made up for.
            self._num_printed = int(seconds // self._interval_s)
            self._print()

    def end(self) -> None:
        """Say how the stage ended, if anything was said of it before."""
        if self._num_printed:
            self._print()

    def _print(self) -> None:
        found, total = self._so_far, self._total
        parts = [f"{found.count:,} {self._unit}"]
        if total is not None:
            parts = [f"{found.count:,} of {total:,} {self._unit} ({found.count / max(1, total):.0%})"]
        parts.append(f"{found.per_s:,.0f}/s" if found.per_s >= 10 else f"{found.per_s:.2g}/s")
        if found.num_bytes:
            parts.append(found.bytes_text())
        if total is not None and found.count < total and found.per_s > 0:
            parts.append(f"{format_duration((total - found.count) / found.per_s)} left")
        else:
            parts.append(f"after {format_duration(found.seconds)}")
        print(f"{self._title}: {', '.join(parts)}", file=sys.stderr, flush=True)


def _nothing(count: int, num_bytes: int = 0, /) -> None:
    del count, num_bytes
