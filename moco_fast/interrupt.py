"""Interruption of long work by a signal, where the work says that it can be left. Imports no torch."""

from collections.abc import Generator
from contextlib import contextmanager
from signal import Signals

__all__ = ["StoppedError", "forget_interrupt", "interrupt", "may_be_interrupted"]


class StoppedError(Exception):
    """A signal ended a training, whose state was saved, or an evaluation, which is done again."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {Signals(number).name}: the same command continues from here")
        self.number = number


class _Work:
    may_be_interrupted = False
    signal = 0


@contextmanager
def may_be_interrupted() -> Generator[None]:
    """Let a signal that `StopSignal` listens for raise StoppedError in the block, wherever it is, or as it begins.

    Blocks may lie in each other. Among several ranks the block lies within `distributed.leaving_together` and has no
    collective in it: what is raised as the block begins or ends, too, then ends the work on all ranks.
    """
    before, _Work.may_be_interrupted = _Work.may_be_interrupted, True
    try:
        if _Work.signal:
            interrupt(_Work.signal)
        yield
    finally:
        # What was interrupted is not interrupted again while it leaves the blocks around.
        _Work.may_be_interrupted = before and not _Work.signal


def interrupt(number: int) -> None:
    """Raise StoppedError now or when such work begins; called by the handler of a signal, in the main thread."""
    _Work.signal = number
    if _Work.may_be_interrupted:
        _Work.may_be_interrupted = False
        raise StoppedError(number)


def forget_interrupt() -> None:
    """Let work begin in spite of earlier signals."""
    _Work.signal = 0
