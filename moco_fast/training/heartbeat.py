"""Heartbeat of a run, and its watch over the folder that it writes into."""

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from moco_fast.training import state

__all__ = ["Heartbeat", "RunLostError"]

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class RunLostError(RuntimeError):
    """The folder that a run writes into is gone."""

    def __init__(self, out: str) -> None:
        super().__init__(
            f"--run.out {out} was deleted, moved or replaced under the run, so nothing can be saved any more"
        )


class Heartbeat:
    """Thread that writes heartbeat.json, so that neither slow storage nor a long evaluation matters to it.

    Args:
        folder: of the run.
        lock: descriptor of the folder's lock file, by which the folder is known again.
    """

    def __init__(self, folder: Path, lock: int):
        self._folder, self._lock = folder, lock
        self._step, self._step_time = 0, time.time()
        self._is_lost = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def start(self, step: int) -> None:
        """Write a first beat, after so many steps, and go on by itself."""
        self.step = step
        self._beat()
        self._thread.start()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @step.setter
    def step(self, done: int) -> None:
        self._step, self._step_time = done, time.time()

    @property
    def is_lost(self) -> bool:
        """Whether the folder was deleted, moved or replaced, as of the last beat."""
        return self._is_lost

    def look(self) -> bool:
        """Return whether the folder is lost now."""
        try:
            there, ours = (self._folder / "lock").stat(), os.fstat(self._lock)
            self._is_lost = not os.path.samestat(there, ours)
        except OSError as error:
            # Storage that does not answer for a while has not lost anything.
            self._is_lost = error.errno in _GONE
        return self._is_lost

    def close(self) -> None:
        """Write a last beat and end."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat_on(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._closing.wait(state.BEAT_EVERY_S)
            if not self._beat():
                return

    def _beat(self) -> bool:
        """Write a beat, and return whether the folder is still there."""
        if self.look():
            return False
        # A full disk misses a beat; what else fails of it is the loop's to say.
        with suppress(OSError):
            state.write_beat(self._folder, state.Beat.now(step=self._step, step_time=self._step_time))
        return True
