"""Threads that do the same to many things, some steps ahead of who takes the results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["mapped"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def mapped(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, threads: int, ahead: int
) -> Generator[tuple[ItemT, ResultT]]:
    """Return each item with what a function gives for it, in order. What waits for a network should be read so.

    Args:
        function: called by several threads at once.
        items: taken as they are needed.
        threads: that call it.
        ahead: at most so many results wait for being taken, so that any number of items takes bounded memory.

    Raises:
        Exception: what the function raised. No thread is left then, nor once the generator is closed.
    """
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
