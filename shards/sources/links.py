"""Symbolic links in a folder: which may be followed, and folders that are reached more than once.

Hugging Face's cache keeps the bytes of a repository under `blobs/`, and under `snapshots/REVISION/` links to them:
those are followed without being asked for, since one client wrote both.
"""

import os
import re
from functools import cached_property
from pathlib import Path

from shards.ground.errors import Rejected
from shards.sources.base import printable

__all__ = ["LINK_REASONS", "Links", "refuse_cache"]

_LEAVES, _TO_FOLDER = "link leaves the source", "link to a folder"
LINK_REASONS = (_LEAVES, _TO_FOLDER)
"""Reasons of rejections that --follow-links prevents."""

_REVISION = re.compile(r"[0-9a-f]{40}")


class Links:
    """What may be done with the links in a folder.

    Args:
        root: the folder's absolute path.
        follow: links that leave the folder, and links to folders, are followed too.
    """

    def __init__(self, root: bytes, *, follow: bool) -> None:
        self.follow = follow
        self._root = root
        self._entered: set[tuple[int, int]] = set()

    @cached_property
    def _inside(self) -> tuple[bytes, ...]:
        """Resolved folders that a link may lead into without being asked for, each with a slash."""
        root = os.path.realpath(self._root)
        path = Path(os.fsdecode(root))
        snapshots = next((each for each in (path, *path.parents) if each.parent.name == "snapshots"), None)
        inside = [root]
        if snapshots is not None and (blobs := snapshots.parent.parent / "blobs").is_dir():
            inside.append(os.path.realpath(os.fsencode(blobs)))
        return tuple(each.rstrip(b"/") + b"/" for each in inside)

    def target(self, path: bytes) -> bytes:
        """Return where a link leads. Raises Rejected: it leads out of the source, or to a folder."""
        target = os.path.realpath(path)
        if not self.follow and not (target + b"/").startswith(self._inside):
            raise Rejected(_LEAVES, f"to {printable(target)}; --follow-links packs what is there")
        if os.path.isdir(target):  # noqa: PTH112 - bytes
            raise Rejected(_TO_FOLDER, f"to {printable(target)}; --follow-links packs what is in it")
        return target

    def may_read(self, path: bytes) -> bool:
        """Return whether a path is no link, or one that is followed to a file."""
        try:
            self.target(path)
        except Rejected:
            return False
        return True

    def enter(self, path: bytes, *, is_link: bool) -> bool:
        """Return whether a folder is to be listed: False where it was already, or will be under its own name."""
        if not self.follow:
            return True
        if is_link and (os.path.realpath(path) + b"/").startswith(self._inside):
            return False
        status = os.stat(path)  # noqa: PTH116 - bytes
        identity = (status.st_dev, status.st_ino)
        if identity in self._entered:
            return False
        self._entered.add(identity)
        return True


def refuse_cache(folder: str, subfolders: list[str]) -> None:
    """Refuse a repository in Hugging Face's cache as a whole, where every file lies at least twice.

    Args:
        folder: path for messages.
        subfolders: names of the folders in it.

    Raises:
        ValueError: says which revisions there are.
    """
    if not {"blobs", "snapshots"} <= set(subfolders):
        return
    revisions = sorted(path.name for path in Path(folder, "snapshots").iterdir() if _REVISION.fullmatch(path.name))
    if revisions:
        choices = " or ".join(f"{folder}/snapshots/{name}" for name in revisions)
        raise ValueError(
            f"{folder} is a repository in Hugging Face's cache, which keeps every version of its files: give one of "
            f"them, {choices}"
        )
