"""Stop signals: a signal to any rank makes all ranks stop after the same step."""

import signal
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from moco_fast.interrupt import forget_interrupt, interrupt

__all__ = ["StopSignal"]


class StopSignal:
    """Listens for SIGTERM, SIGHUP, SIGUSR1 and SIGINT, and agrees with the other ranks on when to stop.

    `poll` is called once per step on every rank. It returns what the ranks agreed on in the previous call, so the
    exchange (two integers over gloo, on the host) overlaps the step and nothing waits for the GPU. A second SIGINT
    interrupts immediately. SIGHUP stays ignored where it is, as under nohup.

    Args:
        timeout_s: seconds that ranks wait for each other.
        interrupts: a signal also raises StoppedError in work that `interrupt.may_be_interrupted`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, *, timeout_s: float, interrupts: bool = False):
        self._received = 0
        self._interrupts = interrupts
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            # new_group returns a number to ranks outside the group, but this group contains all ranks.
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._asked = self._granted = 0
        self._agreed = torch.zeros(2, dtype=torch.int32)  # a signal, and what was asked for
        self._exchange: dist.Work | None = None
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in self.SIGNALS if not (is_ignored and number == signal.SIGHUP)]
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in heard}

    def poll(self) -> int:
        """Return the signal that all ranks have agreed to stop for, or 0."""
        if self._group is None:
            self._granted, self._asked = max(self._granted, self._asked), 0
            return self._received
        agreed = self._wait()
        self._agreed[0], self._agreed[1], self._asked = self._received, self._asked, 0
        self._exchange = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

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
        self._wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        forget_interrupt()

    def _wait(self) -> int:
        if self._exchange is None:
            return 0
        self._exchange.wait()
        self._exchange = None
        agreed, granted = self._agreed.tolist()
        self._granted = max(self._granted, granted)
        return agreed

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = max(self._received, number)
        if self._interrupts:
            interrupt(number)
