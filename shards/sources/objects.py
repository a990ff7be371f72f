"""Objects below a prefix of a bucket."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.config import Columns
from shards.ground.errors import Rejected
from shards.sources.base import Input, Source, printable
from shards.sources.registry import nested_source
from shards.storage.stores import Folder, open_folder

__all__ = ["ObjectsSource"]


class ObjectsSource:
    """Every object below a URL.

    Args:
        path: the URL.
        columns: for tables among the objects.
    """

    is_remote = True

    def __init__(self, path: str, columns: Columns | None = None) -> None:
        self.path = path
        self._columns = columns or Columns()

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "objects", "path": self.path}

    def _folder(self) -> Folder:
        return open_folder(self.path.rstrip("/"))

    def inputs(self, spool: Path) -> Iterator[Input | Source]:
        """List all objects, sorted by name; archives and tables among them are sources of their own."""
        del spool
        nested: list[Source] = []
        for name, size in sorted(self._folder().objects()):
            source = nested_source(f"{self.path.rstrip('/')}/{name}", self._columns)
            if source is not None:
                nested.append(source)
            else:
                yield Input(os.fsencode(name), name.rpartition("/")[0].rpartition("/")[2] or None, None, -1, size)
        yield from nested

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of an object."""
        del offset, size
        try:
            return self._folder().read(os.fsdecode(name))
        except FileNotFoundError:
            raise Rejected("unreadable", "no such object") from None

    def describe(self, name: bytes) -> str:
        """Return the URL of the object."""
        return f"{printable(os.fsencode(self.path.rstrip('/')))}/{printable(name)}"
