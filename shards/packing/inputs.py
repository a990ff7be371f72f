"""Inputs of a plan, read one after the other from local files, and many at a time over a network."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.ground.errors import Rejected
from shards.packing.plan import PackPlan
from shards.sources import Source

__all__ = ["ReadInput", "read_inputs"]

_THREADS = 16
_AHEAD = 48


class ReadInput(NamedTuple):
    """An input, with its bytes or why they cannot be had."""

    source: Source
    name: bytes
    label: int
    data: bytes | Rejected


def _read(source: Source, name: bytes, offset: int, size: int) -> bytes | Rejected:
    try:
        return source.read(name, offset, size)
    except Rejected as rejected:
        return rejected


def read_inputs(plan: PackPlan, rows: NDArray[np.void]) -> Generator[ReadInput]:
    """Read some rows of a plan, in their order."""
    listing = plan.inputs(rows)
    if not plan.is_remote:
        for source, name, offset, size, label in listing:
            yield ReadInput(source, name, label, _read(source, name, offset, size))
        return
    threads = ThreadPoolExecutor(_THREADS)
    ahead: deque[tuple[Source, bytes, int, Future[bytes | Rejected]]] = deque()
    try:
        for source, name, offset, size, label in listing:
            ahead.append((source, name, label, threads.submit(_read, source, name, offset, size)))
            if len(ahead) > _AHEAD:
                yield _first(ahead)
        while ahead:
            yield _first(ahead)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _first(ahead: deque[tuple[Source, bytes, int, "Future[bytes | Rejected]"]]) -> ReadInput:
    source, name, label, future = ahead.popleft()
    return ReadInput(source, name, label, future.result())
