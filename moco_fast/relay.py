"""Relay of a signal to one rank: the others learn of it while their main threads compute or wait for each other."""

import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - documented there

__all__ = ["relaying"]

_LOOK_EVERY_S = 0.5
"""Between two looks for signals to other ranks: a request of some bytes to the store."""
_END = 0  # no signal has this number


@contextmanager
def relaying(
    store: Store, key: str, numbers: Collection[int], *, known: int, deliver: Callable[[int], object]
) -> Generator[None]:
    """Tell other ranks in the block of a signal to this one, and this one of a signal to them, by a thread.

    Python handles a signal in the main thread, and not while that waits in a collective. What the kernel calls writes
    the signal's number into a pipe all the same (`signal.set_wakeup_fd`).

    Args:
        store: of the ranks.
        key: name in the store, the same on all ranks, for one signal.
        numbers: of the signals.
        known: signal that this rank has had before the block; 0: none.
        deliver: called in the thread with the signal that another rank has had, once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as the kernel's part needs it
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_relay, args=(reading, store, key, numbers, known, deliver), name="signals", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, bytes([_END]))
        thread.join()
        os.close(reading)
        os.close(writing)


def _relay(
    reading: int, store: Store, key: str, numbers: Collection[int], known: int, deliver: Callable[[int], object]
) -> None:
    # The store ends with the process that holds it, and then the run does, too.
    with suppress(RuntimeError):
        if known:
            store.set(key, str(known))
        while True:
            ready, _, _ = select.select([reading], [], [], _LOOK_EVERY_S)
            written = os.read(reading, 4096) if ready else b""
            own = max((number for number in written if number in numbers), default=0)
            if own and not known:
                known = own
                store.set(key, str(known))
            if _END in written:
                return
            if not known and store.check([key]):
                known = int(store.get(key))
                deliver(known)
