"""Folder tree of image files."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.images.sniff import SNIFFED_BYTES
from shards.sources.base import Aside, Input, Source, printable
from shards.sources.beside import OF_SET, describe_sets
from shards.sources.links import Links, refuse_cache
from shards.sources.registry import nested_source
from shards.sources.samples import SeveralImages, sifted
from shards.storage.file_kinds import litter, may_be_archive
from shards.storage.stores import absolute

__all__ = ["FolderSource", "read_file"]

# Errors of the disk or the network, not of one file.
_SOURCE_IS_GONE = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV})
_MAX_FILE_BYTES = 1 << 30
_LISTED_ALREADY = "link to a folder that is listed already"


class FolderSource:
    """Every file below a folder. Links are followed as `shards.sources.links` says; what they lead to has their names.

    Args:
        path: the folder, as the user wrote it.
        options: what is wanted.
        root: the same from the root; found from `path` if empty.
        follow_links: follow every link; None: as the options say.
    """

    is_remote = False

    def __init__(
        self, path: str, options: SourceOptions | None = None, root: str = "", follow_links: bool | None = None
    ) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._root = os.fsencode(root or absolute(path))
        self._links = Links(self._root, follow=self._options.follow_links if follow_links is None else follow_links)

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        root = os.fsdecode(self._root)
        return {"kind": "folder", "path": self.path, "root": root, "follow_links": self._links.follow}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Aside]:
        """List everything that is not a folder, sorted by name within each folder, subfolders after files.

        Archives and tables among the files are sources of their own.
        """
        del spool
        nested: list[Source] = []
        folders, several = [b""], SeveralImages()
        self._links.enter(self._root, is_link=False)
        while folders:
            folder = folders.pop()
            files, subfolders = self._scanned(folder)
            label = os.fsdecode(folder) or None
            describing = describe_sets(files)
            for item in sifted(files, self._options.members, several, self._begin):
                if isinstance(item, Aside) or item in describing:
                    yield item if isinstance(item, Aside) else Aside(OF_SET, item)
                elif (source := self._nested(item)) is not None:
                    nested.append(source)
                else:
                    yield Input(item, label)
            entered: list[bytes] = []
            for name, is_link in sorted(subfolders.items()):
                kind = litter(name + b"/")
                if kind is None and self._links.enter(self._path(name), is_link=is_link):
                    entered.append(name)
                else:
                    yield Aside(kind or _LISTED_ALREADY, name)
            folders += reversed(entered)
        several.refuse(self.path)
        yield from nested

    def _scanned(self, folder: bytes) -> tuple[list[bytes], dict[bytes, bool]]:
        """Return the files right in a folder, sorted, and whether each of its folders is a link; from the source on."""
        files: list[bytes] = []
        subfolders: dict[bytes, bool] = {}
        prefix = folder + b"/" if folder else b""
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    is_link = self._links.follow and entry.is_symlink()
                    # A link that leads nowhere is a file that cannot be read.
                    leads_to_folder = is_link and os.path.isdir(entry.path)  # noqa: PTH112 - pathlib takes no bytes
                    if leads_to_folder or entry.is_dir(follow_symlinks=False):
                        subfolders[prefix + entry.name] = is_link
                    else:
                        files.append(prefix + entry.name)
        except OSError as error:
            raise PackError(
                f"cannot list {printable(self._path(folder))} ({error.strerror}): "
                "its images would be lost silently; make it readable, or move it away"
            ) from error
        refuse_cache(os.fsdecode(self._path(folder)), [os.fsdecode(name[len(prefix) :]) for name in subfolders])
        return sorted(files), subfolders

    def _begin(self, name: bytes) -> bytes:
        """Return a file's first bytes; none of what is not a file or cannot be read."""
        path = Path(os.fsdecode(self._path(name)))
        if not path.is_file() or not self._links.may_read(self._path(name)):
            return b""
        try:
            with path.open("rb") as file:
                return file.read(SNIFFED_BYTES)
        except OSError:
            return b""

    def _path(self, name: bytes) -> bytes:
        return self._root + b"/" + name if name else self._root

    def _nested(self, name: bytes) -> Source | None:
        if not may_be_archive(name) or not self._is_readable_file(self._path(name)):
            return None
        try:
            return nested_source(f"{self.path.rstrip('/')}/{os.fsdecode(name)}", self._options)
        except OSError as error:
            raise PackError(
                f"cannot read {printable(self._path(name))} ({error.strerror}): its images would be lost silently; "
                "make it readable, or move it away"
            ) from error

    def _is_readable_file(self, path: bytes) -> bool:
        """Whether a path is a regular file, or a link to one that is followed."""
        mode = os.lstat(path).st_mode
        return stat.S_ISREG(mode) or (
            stat.S_ISLNK(mode) and self._links.may_read(path) and Path(os.fsdecode(path)).is_file()
        )

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of a file; `offset` and `size` are not used."""
        del offset, size
        path = self._path(name)
        try:
            return read_file(path, follow=self._links.target)
        except Rejected as rejected:
            if rejected.reason == "unreadable" and not Path(os.fsdecode(self._root)).is_dir():
                raise PackError(f"cannot read {printable(path)}: is {self.path} still there?") from None
            raise

    def describe(self, name: bytes) -> str:
        """Return the path of the file."""
        return printable(os.fsencode(self.path).rstrip(b"/") + b"/" + name)


def read_file(path: bytes, *, follow: Callable[[bytes], bytes] = os.path.realpath) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: absolute.
        follow: where a link leads, or Rejected.

    Raises:
        Rejected: no regular file, or it cannot be read.
        PackError: the disk or the network fails.
    """
    if b"\0" in path:
        raise Rejected("unreadable", "its path holds a zero byte")
    try:
        return _read_whole(_open(path, follow))
    except OSError as error:
        if error.errno in _SOURCE_IS_GONE:
            raise PackError(
                f"cannot read {printable(path)} ({error.strerror}): fix this and run the same command again"
            ) from error
        raise Rejected("unreadable", error.strerror or str(error)) from None


def _open(path: bytes, follow: Callable[[bytes], bytes]) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return os.open(follow(path), flags)
        if error.errno == errno.ENXIO:
            raise Rejected("not a file", "a socket or a device") from None
        raise


def _read_whole(fd: int) -> bytes:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("not a file", stat.filemode(status.st_mode))
        if status.st_size > _MAX_FILE_BYTES:
            raise Rejected("too many bytes", f"{status.st_size} bytes, more than {_MAX_FILE_BYTES}")
        data = os.read(fd, status.st_size) if status.st_size else b""
        while len(data) < status.st_size:
            more = os.read(fd, status.st_size - len(data))
            if not more:
                raise Rejected("unreadable", "changed while it was read")
            data += more
        return data
    finally:
        os.close(fd)
