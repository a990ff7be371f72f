"""Files that appear whole or not at all, and a lock that dies with its owner."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from shards.ground.errors import PackError

__all__ = ["locked", "open_locked", "publish", "sync_file", "sync_folder", "write_and_sync"]


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(pairs: list[tuple[Path, Path]]) -> None:
    """Rename synced temporary files to their final names, in one folder, and sync that folder."""
    for temporary, final in pairs:
        temporary.replace(final)
    for folder in {final.parent for _, final in pairs}:
        sync_folder(folder)


@contextmanager
def locked(path: Path, *, holder: str, shared: bool = False, wait: bool = False) -> Generator[None]:
    """Hold a lock file; the kernel releases it when the process ends, however it ends.

    Args:
        path: the file.
        holder: what the lock stands for, in the error.
        shared: others may hold it shared too.
        wait: wait for others instead of refusing.

    Raises:
        PackError: someone else holds it.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    fd = open_locked(path, how, holder)
    try:
        if not shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def open_locked(path: Path, how: int, holder: str) -> int:
    """Descriptor of a file, made if need be, that is locked with these flags of flock. Raises PackError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, how)
            # Its last owner may have removed it between our two calls; such a lock would hold off nobody.
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            owner = os.pread(fd, 100, 0).decode(errors="replace").strip() or "its owner is not known"
            os.close(fd)
            raise PackError(
                f"{holder} is in use by another make-shards ({owner}): wait for it, end it, or choose another folder"
            ) from None
        except FileNotFoundError:
            pass
        os.close(fd)
