"""Clock that splits a device's time among named parts without waiting for the device."""

import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

__all__ = ["PartClock"]

P = ParamSpec("P")
T = TypeVar("T")


class PartClock:
    """Clock that reads the time at every boundary between parts. Nested parts count only for themselves.

    Time in no part does not count. On a GPU the boundaries are events on its current stream: the GPU's time is split,
    idle or not, and the host runs ahead as usual. On a CPU they are readings of the host's clock.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._inside: list[str | None] = [None]
        self._borders: list[tuple[str | None, float | torch.cuda.Event]] = []

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last `read`. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: defaultdict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self._borders, self._borders[1:], strict=False):
            if name is not None:
                seconds[name] += _seconds_between(before, after)
        self._borders.clear()
        return dict(seconds)

    def enter(self, name: str) -> None:
        """Begin a part."""
        self._border()
        self._inside.append(name)

    def leave(self) -> None:
        """End the part that was begun last."""
        self._border()
        self._inside.pop()

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Return a context whose duration is counted as part `name`."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap `function` so that each call is counted as part `name`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def _border(self) -> None:
        """Attribute the time until now to the innermost part."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._borders.append((self._inside[-1], event))
        else:
            self._borders.append((self._inside[-1], time.perf_counter()))


def _seconds_between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(after, torch.cuda.Event)
        return before.elapsed_time(after) / 1e3
    assert not isinstance(after, torch.cuda.Event)
    return after - before
