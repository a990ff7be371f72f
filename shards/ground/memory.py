"""Shared memory without a name in the file system: nothing is left, whatever kills the processes that share it."""

import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np

from shards.ground.arrays import Encoded

__all__ = ["create_shared", "lend", "map_shared", "shared_path"]


def create_shared(name: str, content: int | bytes) -> int:
    """Make a block of memory and return its descriptor.

    Args:
        name: for those who look at the process from outside.
        content: what it holds, or its size in bytes. Pages that are never written cost nothing.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, content if isinstance(content, int) else len(content))
    if isinstance(content, bytes):
        with mmap.mmap(descriptor, len(content)) as memory:
            memory[:] = content
    return descriptor


def shared_path(descriptor: int) -> str:
    """Return the path by which other processes of this user open a block of this one."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def map_shared(path: str, num_bytes: int) -> mmap.mmap:
    """Map a block. Raises FileNotFoundError when the process that made it is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def lend(array: Encoded, on_return: Callable[[], object]) -> Encoded:
    """Return an array on the same memory; `on_return` is called once all arrays and tensors made of it are dropped."""
    lease = _Lease(array)
    weakref.finalize(lease, on_return).atexit = False
    return np.asarray(lease)


class _Lease:
    """Lends an array: every array and tensor made of it keeps this object alive."""

    def __init__(self, array: Encoded) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array
