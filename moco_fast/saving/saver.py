"""Saver of a run: copies its state while training waits, and writes it while training goes on."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from moco_fast import checkpoint, distributed
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import CheckpointConfig
from moco_fast.host_exchange import HostExchange, open_exchange
from moco_fast.saving.due import Due
from moco_fast.saving.mirror import Mirror
from moco_fast.saving.staging import NoRoomError, Staging

__all__ = ["Need", "Saver"]


class Need(IntEnum):
    """What the first rank asks all ranks for."""

    NOTHING = 0
    SAVE = 1
    """A checkpoint is due by time."""
    END = 2
    """The last one could not be written."""
    LEAVE = 3
    """There is no folder any more."""


class Saver:
    """Saves a run's checkpoints; every rank has one, and the first one writes.

    A rank waits at a save for what a step's collectives make it wait for, and the first one also for its copy; if the
    save before is still being written, for that as well. A save that fails ends the run on all ranks (`Need.END`).

    Args:
        folder: of the run's checkpoints.
        config: when, and what is kept.
        device: of the run.
        timeout_s: seconds that ranks wait for each other.
        before: called, by the thread that writes, before a checkpoint appears.
        mirror: where each goes, too; None: nowhere. Only the first rank has one.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        device: torch.device,
        *,
        timeout_s: float,
        before: Callable[[], None] | None = None,
        mirror: Mirror | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._config, self._device = folder, config, device
        self._before, self._mirror, self._say = before, mirror, say
        self._exchange = open_exchange(timeout_s=timeout_s) if distributed.world_size() > 1 else None
        self.due = Due(config)
        """When; tests give it another clock."""
        self._staging = Staging(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[float] | None = None
        """Of the first rank: the last write, under way or done."""
        self._states: _States | None = None
        self._is_asked_for = False
        self._cost_s = 0.0
        self._is_measured = True
        self._said: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether all ranks save after this step."""
        return self.due.by_steps(step)

    def needs(self) -> Need:
        """Return what all ranks should be asked for; called by the first one, after each step."""
        if self.writing is not None and self.writing.done():
            if self.writing.exception() is not None:
                return Need.END
            if not self._is_measured:
                self._is_measured = True
                if words := self.due.measured(cost_s=self._cost_s, write_s=self.writing.result()):
                    self._say(words)
        if self._mirror is not None:
            if self._mirror.lost is not None:
                return Need.END
            for line in self._mirror.take_warnings():
                self._say(line)
        # Ranks answer a step later: asked twice, they would save twice.
        if self._is_asked_for or not self.due.by_time():
            return Need.NOTHING
        self._is_asked_for = True
        return Need.SAVE

    def save(self, state: Checkpoint | None, *, best: int | None = None) -> None:
        """Copy the run's state, and begin to write it; collective.

        Args:
            state: of the first rank, without the generators' states, which are all ranks'; other ranks: None. Its
                `model["watched.sums"]` must be finite by the time that it is written.
            best: step of the best checkpoint, which may be this one.
        """
        began = time.perf_counter()
        self.due.began()
        self._is_asked_for = False
        states = _States(checkpoint.generator_states(distributed.rank(), self._device), self._exchange)
        self._wait_for_the_one_before()
        self._states = states
        if state is None or self._failure() is not None:
            return
        self._is_measured = False
        tensors = {("model", name): each for name, each in state.model.items()}
        tensors |= {("optimizer", name): each for name, each in state.optimizer.items()}
        try:
            copies = self._staging.copy({f"{part}.{name}": each for (part, name), each in tensors.items()})
        except NoRoomError as error:
            self._say_once(f"checkpoints: training waits while they are written, since {error}")
            self.writing = _done_now(lambda: self._write(state, states, best))
        else:
            of_parts = {
                wanted: {name: copies[f"{part}.{name}"] for part, name in tensors if part == wanted}
                for wanted in ("model", "optimizer")
            }
            copied = dataclasses.replace(state, **of_parts)
            self.writing = self._pool.submit(self._write, copied, states, best, wait=self._staging.wait)
        self._cost_s = time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk, and in the mirror; collective.

        Raises:
            OSError, FloatingPointError, RuntimeError: as `end`.
        """
        if self._states is not None:
            self._states.wait()
        if self.writing is not None:
            self.writing.exception()
        if self._mirror is not None:
            self._mirror.wait()
        self.end()

    def end(self) -> None:
        """Raise, on all ranks, why a checkpoint was not written; return if each was. Collective.

        Raises:
            OSError: it could not be written, or the mirror has it not.
            FloatingPointError: the state is not finite.
            RuntimeError: anything else.
        """
        error = self._failure()
        kind, text = distributed.tell_all((_kind_of(error), str(error)))
        if kind is not None:
            raise kind(text) from error

    def close(self) -> None:
        """Let what is being written be finished, whatever becomes of the run."""
        self._pool.shutdown(wait=True)
        if self._mirror is not None:
            self._mirror.close()

    def _write(
        self, state: Checkpoint, states: "_States", best: int | None, wait: Callable[[], None] | None = None
    ) -> float:
        """Write a checkpoint; return the seconds that it took."""
        began = time.perf_counter()
        if wait is not None:
            wait()
        if not state.model["watched.sums"].isfinite().all():
            raise FloatingPointError(f"the loss is no longer a number before step {state.step}, which is not saved")
        if self._before is not None:
            self._before()
        config, spared = self._config, () if self._mirror is None else self._mirror.being_read()
        whole = dataclasses.replace(state, rng=states.wait())
        checkpoint.save(self._folder, whole, keep=config.keep, keep_every=config.keep_every, best=best, spared=spared)
        if self._mirror is not None:
            self._mirror.offer()
        return time.perf_counter() - began

    def _wait_for_the_one_before(self) -> None:
        if self._states is not None:
            self._states.wait()
        if self.writing is None or self.writing.done():
            return
        began = time.perf_counter()
        self.writing.exception()
        self._say_once(
            f"checkpoints: the one before was still being written, and training waited "
            f"{time.perf_counter() - began:.1f} s for it: save less often, or to a faster disk"
        )

    def _failure(self) -> BaseException | None:
        if self.writing is not None and self.writing.done() and (error := self.writing.exception()):
            return error
        return None if self._mirror is None else self._mirror.lost

    def _say_once(self, line: str) -> None:
        if (about := line.partition(",")[0]) not in self._said:
            self._said.add(about)
            self._say(line)


class _States:
    """States of the generators of all ranks, on their way to the first one; nothing waits for them before `wait`."""

    def __init__(self, own: Mapping[str, Tensor], exchange: HostExchange | None) -> None:
        self._own = dict(own)
        self._gathered: Callable[[], list[Tensor]] | None = None
        if exchange is not None:
            self._gathered = exchange.begin_gather(torch.cat([own[name] for name in sorted(own)]))

    def wait(self) -> dict[str, Tensor]:
        """Return them by the names under which a checkpoint keeps them; on other ranks only their own."""
        of_ranks = [] if self._gathered is None else self._gathered()
        if not of_ranks:
            return self._own
        sizes = [len(self._own[name]) for name in sorted(self._own)]
        kinds = [name.partition(".")[2] for name in sorted(self._own)]
        return {
            f"{rank}.{kind}": part
            for rank, flat in enumerate(of_ranks)
            for kind, part in zip(kinds, flat.split(sizes), strict=True)
        }


def _done_now(function: Callable[[], float]) -> Future[float]:
    future: Future[float] = Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future


def _kind_of(error: BaseException | None) -> type[Exception] | None:
    if error is None:
        return None
    return next((kind for kind in (OSError, FloatingPointError) if isinstance(error, kind)), RuntimeError)
