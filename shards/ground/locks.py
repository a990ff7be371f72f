"""Lock files that die with their owner: the kernel releases them when a process ends, however it ends."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from shards.ground.errors import InUseError

__all__ = ["is_locked", "locked", "open_locked", "remove_unlocked", "take_lock"]


@contextmanager
def locked(path: Path, *, holder: str, shared: bool = False, wait: bool = False) -> Generator[None]:
    """Hold a lock file.

    Args:
        path: the file.
        holder: what the lock stands for, in the error.
        shared: others may hold it shared too.
        wait: wait for others instead of refusing.

    Raises:
        InUseError: someone else holds it.
    """
    descriptor = take_lock(path, holder=holder, shared=shared, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def take_lock(path: Path, *, holder: str, shared: bool = False, wait: bool = False) -> int:
    """Lock a file as `locked` does, until the descriptor that is returned is closed."""
    descriptor = open_locked(path, holder=holder, shared=shared, wait=wait)
    if not shared:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    return descriptor


def open_locked(path: Path, *, holder: str, shared: bool = False, wait: bool = False) -> int:
    """Open a file, made if need be, and lock it; its content stays. Returns its descriptor. Raises InUseError."""
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, how)
            # Its last owner may have removed it between our two calls; such a lock would keep no one out.
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "its owner is not known"
            os.close(descriptor)
            raise InUseError(
                f"{holder} is in use by another process ({owner}): wait for it, end it, or choose another folder"
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether someone holds a lock file alone; one that is not there is held by no one.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_unlocked(path: Path) -> bool:
    """Remove a file that no one has locked. Returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
