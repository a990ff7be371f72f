"""Progress bars: rate and time left, on a terminal only; and lines beside them."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["ProgressBars"]


class ProgressBars:
    """Draws one bar for each stage of the work.

    Args:
        enabled: False draws nothing.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    @contextmanager
    def stage(
        self, title: str, *, unit: str, total: int | None = None, done: int = 0
    ) -> Generator[Callable[[int], object]]:
        """Draw a bar over one stage; calling what it gives moves the bar by a number of units."""
        if not self._enabled:
            yield _nothing
            return
        from tqdm import tqdm

        # None: silent where standard error is no terminal.
        with tqdm(desc=title, unit=unit, total=total, initial=done, unit_scale=True, disable=None) as bar:
            yield bar.update

    def say(self, text: str) -> None:
        """Print a line beside the bars."""
        if self._enabled:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)


def _nothing(count: int) -> None:
    del count
