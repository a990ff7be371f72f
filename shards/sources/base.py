"""The interface of a source, and how one is found for what the user named."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.config import Columns
from shards.storage.stores import check_url, is_url

__all__ = ["Columns", "Input", "Source", "nested_source", "open_source", "printable", "reopen_source"]


class Input(NamedTuple):
    """One listed input."""

    name: bytes
    """Finds it inside its source."""
    folder: str | None = None
    """Name of the folder that holds it."""
    label: str | int | None = None
    """Class that the source itself gives: a name, or a bare number."""
    offset: int = -1
    """First byte inside an archive, or what else the source needs to find it."""
    size: int = -1
    """Bytes there; -1: unknown until it is read."""


class Source(Protocol):
    """Lists its inputs in an order that depends on nothing but its content, and reads any one of them."""

    is_remote: bool
    """Reading waits for a network: many inputs should be read at a time."""

    def spec(self) -> dict[str, Any]:
        """What `reopen_source` needs to open it again in another process, after `inputs` was exhausted."""
        ...

    def inputs(self, spool: Path) -> Iterator["Input | Source"]:
        """List every input, and sources found inside this one.

        Args:
            spool: a file that the source may write, for what cannot be read by ranges where it is.

        Raises:
            PackError: the source as a whole cannot be read.
        """
        ...

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Bytes of one input.

        Raises:
            Rejected: this input cannot be read.
            PackError: the source as a whole cannot be read any more.
        """
        ...

    def describe(self, name: bytes) -> str:
        """Where the input came from, for people: one line of valid UTF-8."""
        ...


_KINDS = {
    "folder": "shards.sources.folder:FolderSource",
    "objects": "shards.sources.objects:ObjectsSource",
    "tar": "shards.sources.tarfiles:TarSource",
    "zip": "shards.sources.zipfiles:ZipSource",
    "table": "shards.sources.tables:TableSource",
    "list": "shards.sources.lists:ListSource",
}

_ARCHIVES = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
    ".zip": "zip",
    ".parquet": "table",
    ".arrow": "table",
}
_LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".txt.gz", ".csv.gz", ".tsv.gz", ".jsonl.gz")


def _kind(name: str) -> Callable[..., Source]:
    module, _, attribute = _KINDS[name].partition(":")
    return getattr(import_module(module), attribute)


def nested_source(path: str, columns: Columns) -> Source | None:
    """The source that a file inside a folder is, by its name: an archive or a table; None for anything else."""
    lower = path.lower()
    for suffix, kind in _ARCHIVES.items():
        if lower.endswith(suffix):
            return _kind(kind)(path, **({"columns": columns} if kind == "table" else {}))
    return None


def open_source(path: str, columns: Columns) -> Source:
    """Find the kind of a source.

    Raises:
        ValueError: there is nothing there, or nothing that can be listed.
    """
    remote = is_url(path)
    if remote:
        check_url(path)
    elif os.path.isdir(path):  # noqa: PTH112 - the text that the user gave is kept as it is
        return _kind("folder")(path, columns=columns)
    elif not os.path.exists(path):  # noqa: PTH110
        raise ValueError(f"{path} does not exist: give a folder, an archive, a table, a list, or the URL of one")
    nested = nested_source(path, columns)
    if nested is not None:
        return nested
    if path.lower().endswith(_LISTS):
        return _kind("list")(path, columns=columns)
    if remote and not path.startswith("http"):
        return _kind("objects")(path, columns=columns)
    raise ValueError(
        f"{path} is no source: give a folder, or a file that ends in {' '.join(_ARCHIVES)} {' '.join(_LISTS[:4])}"
    )


def reopen_source(spec: dict[str, Any], folder: Path) -> Source:
    """Open a source that a plan names.

    Args:
        spec: from `Source.spec`.
        folder: the plan's folder, where spools are.
    """
    options = dict(spec)
    if "spool" in options:
        options["spool"] = folder / options["spool"]
    return _kind(options.pop("kind"))(**options)


def printable(name: bytes) -> str:
    """A name on one line of valid UTF-8; what cannot be printed, and backslashes, become hexadecimal escapes."""
    text = name.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
