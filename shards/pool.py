"""Worker processes that write shards. Nobody waits for a worker that is dead, and no worker outlives its parent."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_uint64
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from shards.config import EncodeConfig
from shards.errors import PackError
from shards.plan import Plan, Task
from shards.write import Workplace, write_shard

__all__ = ["default_workers", "write_shards"]

_POLL_S = 0.2


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def write_shards(
    plan: Plan,
    tasks: Sequence[Task],
    place: Workplace,
    config: EncodeConfig,
    *,
    workers: int,
    tick: Callable[[int], object],
) -> None:
    """Write shards with some worker processes; one worker is this process itself.

    Raises:
        PackError: a worker died, or met what packing cannot go on from. Finished shards stay.
        OSError: the target cannot be written.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            write_shard(plan, task, place, config, lambda: tick(1))
        return
    pool = _Pool(plan, place, config, min(workers, len(tasks)))
    try:
        pool.run(deque(tasks), tick)
    finally:
        pool.close()


class _Pool:
    """Processes with a pipe each; a worker holds one task at a time."""

    def __init__(self, plan: Plan, place: Workplace, config: EncodeConfig, workers: int) -> None:
        # A forked child would share threads and locks that storage clients may hold.
        context = multiprocessing.get_context("spawn")
        self._counters = context.RawArray(c_uint64, workers)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, number, self._counters, plan.folder, place, config)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, tasks: deque[Task], tick: Callable[[int], object]) -> None:
        """Hand out all tasks and wait until they are done."""
        seen, busy = 0, 0
        for pipe in self._pipes:
            pipe.send(tasks.popleft())
            busy += 1
        while busy:
            for ready in wait([*self._pipes, *(process.sentinel for process in self._processes)], _POLL_S):
                if not isinstance(ready, Connection):
                    self._explain_death(ready)
                elif self._receive(ready):
                    busy -= 1
                    if tasks:
                        ready.send(tasks.popleft())
                        busy += 1
            total = sum(self._counters)
            tick(total - seen)
            seen = total

    def _receive(self, pipe: Connection) -> bool:
        """Whether a task is done; False where the pipe only says that its worker died, which its sentinel explains."""
        try:
            error = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[self._pipes.index(pipe)]
            process.join()
            self._explain_death(process.sentinel)
            return False
        if error is not None:
            raise error
        return True

    def _explain_death(self, sentinel: Any) -> None:
        process = next(process for process in self._processes if process.sentinel == sentinel)
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? use fewer --workers, or a lower --max-pixels)" if code == -signal.SIGKILL else ""
        raise PackError(f"a worker process {how}{hint}: finished shards are kept; run the same command to go on")

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _work(
    pipe: Connection, number: int, counters: Any, plan_folder: Any, place: Workplace, config: EncodeConfig
) -> None:
    # An interrupt goes to the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def tick() -> None:
        counters[number] += 1
        if os.getppid() != parent:
            os._exit(1)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        plan = Plan.open(plan_folder)
        while True:
            task = pipe.recv()
            error = None
            try:
                write_shard(plan, task, place, config, tick)
            except Exception as caught:
                error = caught
            pipe.send(error)
