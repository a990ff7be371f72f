"""Pools of worker processes. A dead worker is noticed at once, and no worker outlives its parent."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from shards.ground.child import Child, WorkerDiedError, start_children
from shards.ground.errors import PackError, portable
from shards.ground.progress import Tick

__all__ = ["main", "run_tasks"]

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
    """Workers that hold one task each."""

    def __init__(self, job: Callable[[Any, Tick], Any], workers: int) -> None:
        children = start_children(__name__, job, count=workers, what="worker process")
        self._children: dict[object, Child] = {child.connection: child for child in children}
        self._connections = [child.connection for child in children]

    def run(self, tasks: deque[Any], tick: Tick) -> Generator[tuple[Any, Any]]:
        """Hand out all tasks and yield their results."""
        given: dict[Child, Any] = {}
        try:
            for child in self._children.values():
                _give(child, tasks, given)
            while given:
                for ready in wait(self._connections):
                    child = self._children[ready]
                    message = child.receive()
                    is_done = isinstance(message, _Done)
                    ticked: _Ticked = message.ticked if is_done else message
                    tick(ticked.count, ticked.num_bytes)
                    if is_done:
                        task = given.pop(child)
                        _give(child, tasks, given)
                        yield task, message.result
        except WorkerDiedError as death:
            raise PackError(
                f"a {death}: finished shards are kept; run the same command to continue (where memory ran out, with "
                "fewer --workers or a lower --max-pixels)"
            ) from None

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for child in self._children.values():
            child.process.kill()
        for child in self._children.values():
            child.close()


def _give(child: Child, tasks: deque[Any], given: dict[Child, Any]) -> None:
    if tasks:
        given[child] = tasks.popleft()
        child.send(given[child])


def main(connection: "Connection[Any, Any]", job: Callable[[Any, Tick], Any]) -> None:
    """Do tasks in a worker process until the parent is gone."""
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
        task = connection.recv()
        try:
            result = job(task, tick)
        except Exception as error:
            connection.send(portable(error, "in a worker process"))
        else:
            connection.send(_Done(result, ticked))
            ticked = _Ticked(0, 0)
