"""A disk that forgets, when the power is cut, what was not synced.

POSIX promises no more: a file's bytes are there after its fsync, a name in a folder after the folder's. Of names that
were added or removed since, any may be there; `Names` are four extremes of that.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

__all__ = ["NAMES", "ForgetfulDisk", "Names"]

Names = Literal["none", "all", "added", "removed"]
"""Which changes of names that were not synced are there after the cut."""

NAMES: tuple[Names, ...] = get_args(Names)


class ForgetfulDisk:
    """Watches a folder; what is in it at the start is on the disk."""

    def __init__(self, root: Path) -> None:
        self._handles: dict[int, int] = {}
        """Open, so that no number is used twice."""
        self._contents: dict[int, bytes] = {}
        """By inode: what was synced."""
        self._names: dict[int, dict[str, int]] = {}
        self._links: dict[int, str] = {}
        self._root = self._hold(root)
        for path in [root, *root.rglob("*")]:
            if not path.is_symlink():
                self._keep(path)

    def watch(self, patch: pytest.MonkeyPatch, on_change: Callable[[], None]) -> None:
        """Keep what is synced from now on; call `on_change` after every change of a name, and after every sync."""
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            sync(descriptor)
            self._keep(Path(f"/proc/self/fd/{descriptor}").resolve())
            on_change()

        patch.setattr(os, "fsync", fsync)
        for name in ("mkdir", "rename", "replace", "rmdir", "symlink", "unlink"):
            patch.setattr(os, name, _and_then(getattr(os, name), on_change))

    def after_a_cut(self, to: Path, names: Names) -> Path:
        """Write what is left into a new folder, and return that."""
        self._restore(self._root, to, names)
        return to

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles.values():
            os.close(handle)

    def _hold(self, path: Path) -> int:
        status = path.lstat()
        if status.st_ino not in self._handles:
            is_folder = stat.S_ISDIR(status.st_mode)
            how = os.O_DIRECTORY if is_folder else os.O_PATH | os.O_NOFOLLOW
            self._handles[status.st_ino] = os.open(path, how | os.O_CLOEXEC)
            if stat.S_ISLNK(status.st_mode):
                self._links[status.st_ino] = str(path.readlink())
        return status.st_ino

    def _keep(self, path: Path) -> None:
        inode = self._hold(path)
        if path.is_dir():
            self._names[inode] = self._names_now(inode)
        else:
            self._contents[inode] = path.read_bytes()

    def _names_now(self, folder: int) -> dict[str, int]:
        handle = self._handles[folder]
        names = os.listdir(handle)  # noqa: PTH208 - of a folder that may have no path by now
        return {name: self._hold(Path(f"/proc/self/fd/{handle}/{name}")) for name in names}

    def _restore(self, inode: int, to: Path, names: Names) -> None:
        if inode in self._links:
            to.symlink_to(self._links[inode])
        elif not stat.S_ISDIR(os.fstat(self._handles[inode]).st_mode):
            to.write_bytes(self._contents.get(inode, b""))
        else:
            to.mkdir()
            before, now = self._names.get(inode, {}), self._names_now(inode)
            added = {name: each for name, each in now.items() if before.get(name) != each}
            removed = {name for name in before if name not in now}
            left = {name: each for name, each in before.items() if names in ("none", "added") or name not in removed}
            left |= added if names in ("all", "added") else {}
            for name, each in left.items():
                self._restore(each, to / name, names)


def _and_then(function: Callable[..., Any], on_change: Callable[[], None]) -> Callable[..., Any]:
    def changed(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        on_change()
        return result

    return changed
