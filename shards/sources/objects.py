"""Objects below a prefix of a bucket."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.config import SourceOptions
from shards.ground.errors import Rejected
from shards.images.sniff import SNIFFED_BYTES
from shards.sources.base import Aside, Input, Source, folder_of, printable
from shards.sources.beside import OF_SET, describe_sets, may_describe
from shards.sources.registry import nested_source
from shards.sources.samples import SeveralImages, sifted
from shards.storage.file_kinds import may_be_archive
from shards.storage.sorted_names import SortedNames
from shards.storage.stores import Folder, open_bytes, open_folder

__all__ = ["ObjectsSource"]


class ObjectsSource:
    """Every object below a URL.

    Args:
        path: the URL.
        options: what is wanted.
    """

    is_remote = True

    def __init__(self, path: str, options: SourceOptions | None = None) -> None:
        self.path = path
        self._options = options or SourceOptions()

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "objects", "path": self.path}

    def _folder(self) -> Folder:
        return open_folder(self.path.rstrip("/"))

    def inputs(self, spool: Path) -> Iterator[Input | Source | Aside]:
        """List all objects, sorted by name; archives and tables among them are sources of their own."""
        nested: list[Source] = []
        beside: list[bytes] = []
        objects = SortedNames(self._listed(beside), spool)
        describing = describe_sets(beside)
        several, sizes = SeveralImages(), deque[int]()
        for item in sifted(_names(objects, sizes), self._options.members, several, self._begin):
            size = sizes.popleft()
            if isinstance(item, Aside) or item in describing:
                yield item if isinstance(item, Aside) else Aside(OF_SET, item)
                continue
            source = self._nested(item)
            if source is not None:
                nested.append(source)
            else:
                yield Input(item, folder_of(item), None, -1, size)
        objects.remove()
        several.refuse(self.path)
        yield from nested

    def _listed(self, beside: list[bytes]) -> Iterator[tuple[bytes, int]]:
        """Return name and size of every object; those that may describe others are added to `beside`."""
        for text, size in self._folder().objects():
            name = text.encode("utf-8", "surrogateescape")
            if may_describe(name):
                beside.append(name)
            yield name, size

    def _nested(self, name: bytes) -> Source | None:
        if not may_be_archive(name):
            return None
        return nested_source(f"{self.path.rstrip('/')}/{os.fsdecode(name)}", self._options)

    def _begin(self, name: bytes) -> bytes:
        return open_bytes(f"{self.path.rstrip('/')}/{os.fsdecode(name)}").read(0, SNIFFED_BYTES)

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


def _names(objects: SortedNames, sizes: deque[int]) -> Iterator[bytes]:
    """Return the names, and note the size of each."""
    for name, size in objects:
        sizes.append(size)
        yield name
