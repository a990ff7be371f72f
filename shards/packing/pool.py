"""Worker processes. Nobody waits for a worker that is dead, and no worker outlives its parent."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from ctypes import c_uint64
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from shards.ground.errors import PackError

__all__ = ["Tick", "default_workers", "run_tasks"]

_POLL_S = 0.2
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

Tick = Callable[[int], object]
"""Called with the number of inputs that were dealt with."""


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    job: Callable[[TaskT, Tick], ResultT], tasks: Sequence[TaskT], *, workers: int, tick: Tick
) -> Iterator[tuple[TaskT, ResultT]]:
    """Do tasks in some worker processes; one worker is this process itself.

    Args:
        job: does one task; it is pickled once for each worker, and opens there what it needs.
        tasks: handed out in this order, one at a time to a worker.
        workers: at most this many processes.
        tick: called now and then with the number of inputs that all workers dealt with.

    Yields:
        Each task with its result, as they finish.

    Raises:
        PackError: a worker died.
        Exception: what a job raised. All workers have ended by then.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, job(task, tick)
        return
    with closing(_Pool(job, min(workers, len(tasks)))) as pool:
        yield from pool.run(deque(tasks), tick)


class _Pool:
    """Processes with a pipe each; a worker holds one task at a time."""

    def __init__(self, job: Callable[[Any, Tick], Any], workers: int) -> None:
        # A forked child would share threads and locks that storage clients may hold.
        context = multiprocessing.get_context("spawn")
        self._counters = context.RawArray(c_uint64, workers)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, number, self._counters, job), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, tasks: deque[Any], tick: Tick) -> Generator[tuple[Any, Any]]:
        """Hand out all tasks and yield their results."""
        seen = 0
        given: dict[Connection, Any] = {}
        for pipe in self._pipes:
            self._give(pipe, tasks, given)
        while given:
            for ready in wait([*self._pipes, *(process.sentinel for process in self._processes)], _POLL_S):
                if not isinstance(ready, Connection):
                    self._explain_death(next(p for p in self._processes if p.sentinel == ready))
                    continue
                result = self._receive(ready)
                task = given.pop(ready)
                self._give(ready, tasks, given)
                yield task, result
            total = sum(self._counters)
            tick(total - seen)
            seen = total

    def _give(self, pipe: Connection, tasks: deque[Any], given: dict[Connection, Any]) -> None:
        if tasks:
            given[pipe] = tasks.popleft()
            # A worker that just died is noticed by its sentinel.
            with suppress(BrokenPipeError):
                pipe.send(given[pipe])

    def _receive(self, pipe: Connection) -> Any:
        try:
            result, error = pipe.recv()
        except (EOFError, ConnectionResetError):
            self._explain_death(self._processes[self._pipes.index(pipe)])
            raise
        if error is not None:
            raise error
        return result

    def _explain_death(self, process: BaseProcess) -> None:
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? use fewer --workers, or a lower --max-pixels)" if code == -signal.SIGKILL else ""
        raise PackError(f"a worker process {how}{hint}: finished shards are kept; run the same command to go on")

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _work(pipe: Connection, number: int, counters: Any, job: Callable[[Any, Tick], Any]) -> None:
    # An interrupt goes to the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def tick(count: int) -> None:
        counters[number] += count
        if os.getppid() != parent:
            os._exit(1)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            try:
                answer = (job(task, tick), None)
            except Exception as error:
                answer = (None, error)
            pipe.send(answer)
