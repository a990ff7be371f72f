"""Open shards, read by offsets."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["LocalShardFile", "ShardFile"]


class ShardFile(Protocol):
    """An open shard. Safe for several threads at once; closes with its last reference."""

    name: str
    """Where it is: a path or an address."""

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill a buffer from an offset and return the bytes read: fewer only at the shard's end. Raises OSError."""
        ...

    @property
    def is_deleted(self) -> bool:
        """Whether it would use no disk any more if it were closed."""
        ...


class LocalShardFile:
    """A shard on this machine.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Read by `preadv`, which holds no lock of the interpreter's."""
        done = 0
        while done < len(buffer):
            try:
                num_read = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.name) from None
            if not num_read:
                break
            done += num_read
        return done

    @property
    def is_deleted(self) -> bool:
        """Whether its name is gone."""
        return os.fstat(self._descriptor).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
