"""A folder tree of image files."""

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

from shards.errors import PackError, Rejected
from shards.sources.base import Input, printable

__all__ = ["FolderSource"]

# These say something about the disk or the network, not about one file.
_SOURCE_IS_GONE = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV})
_MAX_FILE_BYTES = 1 << 30


class FolderSource:
    """Every file below a folder. Links to folders are not followed; links to files only where they stay inside.

    Args:
        path: the folder, as the user wrote it.
        root: the same from the root; found from `path` if empty.
    """

    def __init__(self, path: str, root: str = "") -> None:
        self.path = path
        self._root = os.fsencode(root or os.path.abspath(path))  # noqa: PTH100 - links stay as they are
        self._real_root: bytes | None = None

    def spec(self) -> dict[str, Any]:
        """What `reopen_source` needs."""
        return {"kind": "folder", "path": self.path, "root": os.fsdecode(self._root)}

    def inputs(self) -> Iterator[Input]:
        """List everything that is not a folder, sorted by name within each folder, subfolders after files."""
        folders = [b""]
        while folders:
            folder = folders.pop()
            files: list[bytes] = []
            subfolders: list[bytes] = []
            try:
                with os.scandir(os.path.join(self._root, folder)) as entries:  # noqa: PTH118 - bytes, for any name
                    for entry in entries:
                        (subfolders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
            except OSError as error:
                raise PackError(
                    f"cannot list {printable(os.path.join(self._root, folder))} ({error.strerror}): "  # noqa: PTH118
                    "its images would be lost silently; make it readable, or move it away"
                ) from error
            files.sort()
            label = os.fsdecode(folder.rpartition(b"/")[2]) or None
            prefix = folder + b"/" if folder else b""
            for name in files:
                yield Input(prefix + name, label)
            subfolders.sort(reverse=True)
            folders += [prefix + name for name in subfolders]

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Bytes of a file; `offset` and `size` are not used."""
        del offset, size
        path = self._root + b"/" + name
        try:
            return self._read(path)
        except OSError as error:
            if error.errno in _SOURCE_IS_GONE or not os.path.isdir(self._root):  # noqa: PTH112
                raise PackError(
                    f"cannot read {printable(path)} ({error.strerror}): is {self.path} still there?"
                ) from error
            raise Rejected("unreadable", error.strerror or str(error)) from None

    def _read(self, path: bytes) -> bytes:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                fd = os.open(self._resolve(path), flags)
            elif error.errno == errno.ENXIO:
                raise Rejected("not a file", "a socket or a device") from None
            else:
                raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("not a file", stat.filemode(status.st_mode))
            if status.st_size > _MAX_FILE_BYTES:
                raise Rejected("too many bytes", f"{status.st_size} bytes, more than {_MAX_FILE_BYTES}")
            data = os.read(fd, status.st_size + 1) if status.st_size else b""
            while len(data) < status.st_size:
                more = os.read(fd, status.st_size - len(data))
                if not more:
                    raise Rejected("unreadable", "changed while it was read")
                data += more
            return data
        finally:
            os.close(fd)

    def _resolve(self, path: bytes) -> bytes:
        """Where a link leads, if that is inside the source."""
        if self._real_root is None:
            self._real_root = os.path.realpath(self._root)
        target = os.path.realpath(path)
        if not (target + b"/").startswith(self._real_root.rstrip(b"/") + b"/"):
            raise Rejected("link leaves the source", printable(target))
        if os.path.isdir(target):  # noqa: PTH112
            raise Rejected("not a file", "a link to a folder")
        return target

    def describe(self, name: bytes) -> str:
        """Path of the file."""
        return printable(os.fsencode(self.path).rstrip(b"/") + b"/" + name)
