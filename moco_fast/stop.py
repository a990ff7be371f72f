"""Stop signals: a signal to any rank makes all ranks stop after the same step."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist

from moco_fast.distributed import ranks_store
from moco_fast.host_exchange import HostExchange, open_exchange
from moco_fast.interrupt import forget_interrupt, interrupt
from moco_fast.relay import relaying

__all__ = ["StopSignal"]


class StopSignal:
    """Listens for SIGTERM, SIGHUP, SIGUSR1 and SIGINT, and agrees with the other ranks on when to stop.

    `poll` is called once per step on every rank. It returns what the ranks agreed on in the previous call, so the
    exchange (two integers on the host, host_exchange.py) overlaps the step and nothing waits for the GPU. In work that
    takes long, `reaching_all` takes its place. A second SIGINT interrupts immediately. SIGHUP stays ignored where it
    is, as under nohup.

    Args:
        timeout_s: seconds that ranks wait for each other.
        interrupts: a signal also raises StoppedError in work that `interrupt.may_be_interrupted`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, *, timeout_s: float, interrupts: bool = False):
        self._received, self._is_own = 0, False
        self._relayed = 0  # on its way from the thread that knows of it to the handler
        self._interrupts = interrupts
        self._exchange: HostExchange | None = None
        if dist.is_initialized():
            self._exchange = open_exchange(timeout_s=timeout_s)
        self._asked = self._granted = 0
        self._agreement: Callable[[], list[int]] | None = None  # on a signal, and on what was asked for
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._heard = [number for number in self.SIGNALS if not (is_ignored and number == signal.SIGHUP)]
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in self._heard}

    @property
    def note(self) -> str | None:
        """A line for the user about how ranks agree; None: as usual."""
        return None if self._exchange is None else self._exchange.note

    def poll(self) -> int:
        """Return the signal that all ranks have agreed to stop for, or 0."""
        if self._exchange is None:
            self._granted, self._asked = max(self._granted, self._asked), 0
            return self._received
        agreed = self._wait()
        self._agreement, self._asked = self._exchange.begin_max([self._received, self._asked]), 0
        return agreed

    @contextmanager
    def reaching_all(self) -> Generator[None]:
        """Let a signal to one rank be one to all of them, within a second, in a block that no rank polls in."""
        if self._exchange is None:
            yield
            return
        key = f"moco_fast/signal/{self._exchange.name}"
        with relaying(ranks_store(), key, self._heard, known=self._received, deliver=self._deliver):
            yield

    def ask(self, what: int) -> None:
        """Ask all ranks to do something after the same step; they know by `granted`, as they know of a signal.

        Args:
            what: a number above 0; of several the highest counts.
        """
        self._asked = max(self._asked, what)

    def granted(self) -> int:
        """Return, once, what all ranks know by now that one of them asked for; or 0."""
        granted, self._granted = self._granted, 0
        return granted

    def close(self) -> None:
        """Restore the previous signal handlers."""
        try:
            self._wait()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            forget_interrupt()

    def _wait(self) -> int:
        if self._agreement is None:
            return 0
        agreed, granted = self._agreement()
        self._agreement = None
        self._granted = max(self._granted, granted)
        return agreed

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        relayed, self._relayed = self._relayed, 0
        if relayed:
            number = relayed
        elif number == signal.SIGINT and self._is_own:
            raise KeyboardInterrupt
        else:
            self._is_own = True
        self._received = max(self._received, number)
        if self._interrupts:
            interrupt(number)

    def _deliver(self, number: int) -> None:
        """Take a signal to another rank for one to this, and wake the main thread, which may wait for something."""
        self._relayed = number
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGUSR1)
