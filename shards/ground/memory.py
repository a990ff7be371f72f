"""Shared memory without a name in the file system: nothing is left, whatever kills the processes that share it."""

import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from shards.ground.arrays import Encoded

__all__ = ["SharedBytes", "create_shared", "lend", "map_shared", "shared_path"]

_SMALL_BYTES = 1 << 16


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


class _PlaceOfBytes(NamedTuple):
    """Where shared bytes are, and which ones: a descriptor's number, or a file's name, may become another's."""

    path: str
    device: int
    inode: int
    size: int


class SharedBytes:
    """Bytes that never change, of which the processes of this machine have one copy.

    Pickled, large ones are a path: that of a file, or that of this process's memory, which others can open for as long
    as this object lives here.

    Attributes:
        view: the bytes.
    """

    def __init__(
        self, content: bytes | mmap.mmap, place: _PlaceOfBytes | None = None, descriptor: int | None = None
    ) -> None:
        self.view = memoryview(content)
        self._place = place
        self._descriptor = descriptor
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, content: bytes, *, name: str) -> Self:
        """Keep small bytes as they are, and share large ones under a name for those who look from outside."""
        return cls(content) if len(content) <= _SMALL_BYTES else cls.filled([content], name=name)

    @classmethod
    def filled(cls, chunks: Iterable[bytes], *, name: str) -> Self:
        """Share what comes chunk by chunk, of which this process then holds no copy of its own."""
        descriptor = create_shared(name, 0)
        with open(descriptor, "wb", closefd=False) as file:
            file.writelines(chunks)
        return cls._mapped(descriptor, os.fstat(descriptor))

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Map a file. Raises OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            place = _PlaceOfBytes(str(path.absolute()), status.st_dev, status.st_ino, status.st_size)
            return cls(_map(descriptor, status), place)
        finally:
            os.close(descriptor)

    @classmethod
    def _mapped(cls, descriptor: int, status: os.stat_result) -> Self:
        place = _PlaceOfBytes(shared_path(descriptor), status.st_dev, status.st_ino, status.st_size)
        return cls(_map(descriptor, status), place, descriptor)

    @classmethod
    def _attach(cls, place: _PlaceOfBytes, *, is_file: bool) -> Self:
        """Open what another process has shared. Raises OSError: that process is gone, or its memory is not for us."""
        descriptor = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino, status.st_size) != place[1:]:
            os.close(descriptor)
            raise FileNotFoundError(
                2, "the process that shared this memory is gone, or the file is another", place.path
            )
        if not is_file:
            return cls._mapped(descriptor, status)
        try:
            return cls(_map(descriptor, status), place)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self._place is None:
            return (SharedBytes, (bytes(self.view),))
        return (_attach, (self._place, self._descriptor is None))


def _attach(place: _PlaceOfBytes, is_file: bool) -> SharedBytes:
    return SharedBytes._attach(place, is_file=is_file)  # pyright: ignore[reportPrivateUsage] - of this file


def _map(descriptor: int, status: os.stat_result) -> bytes | mmap.mmap:
    return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ) if status.st_size else b""


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
