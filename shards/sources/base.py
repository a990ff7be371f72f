"""The interface of a source, and how one is found for what the user named."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple, Protocol

__all__ = ["Input", "Source", "open_source", "reopen_source"]


class Input(NamedTuple):
    """One listed input."""

    name: bytes
    """Finds it inside its source."""
    label: str | int | None = None
    """Class name, or a class number that the source itself carries."""
    offset: int = -1
    """First byte inside an archive, or what else the source needs to find it."""
    size: int = -1
    """Bytes there; -1: unknown until it is read."""


class Source(Protocol):
    """Lists its inputs in an order that depends on nothing but its content, and reads any one of them."""

    def spec(self) -> dict[str, Any]:
        """What `reopen_source` needs to open it again in another process."""
        ...

    def inputs(self) -> Iterator[Input]:
        """List every input. Raises PackError when the source as a whole cannot be read."""
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


_KINDS: dict[str, str] = {"folder": "shards.sources.folder:FolderSource"}


def _kind(name: str) -> Callable[..., Source]:
    module, _, attribute = _KINDS[name].partition(":")
    return getattr(import_module(module), attribute)


def open_source(path: str) -> Source:
    """Find the kind of a source.

    Raises:
        ValueError: there is nothing there, or nothing that can be listed.
    """
    if os.path.isdir(path):  # noqa: PTH112 - the text that the user gave is kept as it is
        return _kind("folder")(path)
    raise ValueError(f"{path} is not a folder of images")


def reopen_source(spec: dict[str, Any]) -> Source:
    """Open a source that a plan names."""
    options = dict(spec)
    return _kind(options.pop("kind"))(**options)


def printable(name: bytes) -> str:
    """A name on one line of valid UTF-8; what cannot be printed, and backslashes, become hexadecimal escapes."""
    text = name.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
