"""Pools of worker processes. A dead worker is noticed at once, and no worker outlives its parent.

A task at which a worker dies is done again, once, by another one that knows (`may_die`) and can be careful. Only after
SIGKILL it is not: that is an order from outside, or memory has run out.
"""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from shards.ground.child import Child, WorkerDiedError, start_children
from shards.ground.errors import PackError, portable
from shards.ground.progress import Tick

__all__ = ["main", "may_die", "run_tasks"]

_TICK_S = 0.2
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class _Ticked:
    """What a worker has done since it last reported."""

    count: int
    num_bytes: int


@dataclass(frozen=True)
class _Done:
    """What a job returned, and what was done since the last _Ticked."""

    result: Any
    ticked: _Ticked


_may_die = False


def may_die() -> bool:
    """Return whether this process does a task that will be done again, by another worker, if this one dies."""
    return _may_die


def run_tasks(
    job: Callable[[TaskT, Tick], ResultT], tasks: Sequence[TaskT], *, workers: int, tick: Tick
) -> Iterator[tuple[TaskT, ResultT]]:
    """Do tasks in some worker processes; one worker is this process itself.

    Args:
        job: does one task; it is pickled for the workers, and opens there what it needs.
        tasks: handed out in this order, one at a time per worker.
        workers: at most this many processes.
        tick: called now and then with the number of inputs that the workers have processed, and their bytes.

    Yields:
        Each task with its result, as they finish.

    Raises:
        PackError: a worker was killed, or two died at the same task.
        Exception: what a job raised. All workers have ended by then.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, job(task, tick)
        return
    with closing(_Pool(job, min(workers, len(tasks)))) as pool:
        yield from pool.run(deque(tasks), tick)


class _Pool:
    """Workers that hold one task each."""

    def __init__(self, job: Callable[[Any, Tick], Any], workers: int) -> None:
        self._job = job
        self._children: dict[Any, Child] = {}
        self._ticked: dict[Child, _Ticked] = {}
        """What was done of the task that a worker is at."""
        self._start(workers)

    def _start(self, workers: int) -> list[Child]:
        children = start_children(__name__, self._job, count=workers, what="worker process")
        self._children |= {child.connection: child for child in children}
        return children

    def run(self, tasks: deque[Any], tick: Tick) -> Generator[tuple[Any, Any]]:
        """Hand out all tasks and yield their results."""
        given: dict[Child, _GivenTask] = {}
        try:
            for child in self._children.values():
                _give(child, tasks, given)
            while given:
                for ready in wait(list(self._children)):
                    child = self._children[ready]
                    try:
                        message = child.receive()
                    except (WorkerDiedError, MemoryError) as failure:
                        self._replace(child, given, failure, tick)
                        continue
                    is_done = isinstance(message, _Done)
                    ticked: _Ticked = message.ticked if is_done else message
                    self._tick(child, ticked, tick)
                    if is_done:
                        task = given.pop(child).task
                        del self._ticked[child]
                        _give(child, tasks, given)
                        yield task, message.result
        except WorkerDiedError as death:
            raise PackError(
                f"a {death}: finished shards are kept; run the same command to continue (where memory ran out, with "
                "fewer --workers or a lower --max-pixels)"
            ) from None

    def _tick(self, child: Child, ticked: _Ticked, tick: Tick) -> None:
        tick(ticked.count, ticked.num_bytes)
        before = self._ticked.get(child, _Ticked(0, 0))
        self._ticked[child] = _Ticked(before.count + ticked.count, before.num_bytes + ticked.num_bytes)

    def _replace(
        self, child: Child, given: "dict[Child, _GivenTask]", failure: WorkerDiedError | MemoryError, tick: Tick
    ) -> None:
        """Give the task of a worker that died to a new one, or raise what it died of."""
        is_killed = isinstance(failure, WorkerDiedError) and failure.returncode == -signal.SIGKILL
        if child not in given or is_killed or not given[child].may_die:
            raise failure
        task = replace(given.pop(child), may_die=False)
        done = self._ticked.pop(child, _Ticked(0, 0))
        tick(-done.count, -done.num_bytes)
        del self._children[child.connection]
        child.kill()
        [child] = self._start(1)
        given[child] = task
        child.send(task)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for child in self._children.values():
            child.process.kill()
        for child in self._children.values():
            child.close()


@dataclass(frozen=True)
class _GivenTask:
    """A task as a worker gets it."""

    task: Any
    may_die: bool


def _give(child: Child, tasks: deque[Any], given: dict[Child, _GivenTask]) -> None:
    if tasks:
        given[child] = _GivenTask(tasks.popleft(), may_die=True)
        child.send(given[child])


def main(connection: "Connection[Any, Any]", job: Callable[[Any, Tick], Any]) -> None:
    """Do tasks in a worker process until the parent is gone."""
    global _may_die
    ticked, ticked_s = _Ticked(0, 0), time.monotonic()

    def tick(count: int, num_bytes: int = 0, /) -> None:
        nonlocal ticked, ticked_s
        ticked = _Ticked(ticked.count + count, ticked.num_bytes + num_bytes)
        now_s = time.monotonic()
        if now_s - ticked_s >= _TICK_S:
            try:
                connection.send(ticked)
            except OSError:
                # The parent is gone; a job may catch what is raised here.
                os._exit(1)
            ticked, ticked_s = _Ticked(0, 0), now_s

    while True:
        given: _GivenTask = connection.recv()
        _may_die = given.may_die
        try:
            result = job(given.task, tick)
        except Exception as error:
            connection.send(portable(error, "in a worker process"))
        else:
            connection.send(_Done(result, ticked))
            ticked = _Ticked(0, 0)
