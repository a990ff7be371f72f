"""Sources of images as the packer sees them: the protocol, and what it lists."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["Aside", "Found", "Input", "LabelSet", "Source", "folder_of", "printable"]


class LabelSet(NamedTuple):
    """Classes of an input that may have several."""

    present: tuple[str, ...]
    unsure: tuple[str, ...] = ()
    """Neither there nor absent: they count neither way, as VOC's difficult objects."""


class Found(NamedTuple):
    """What a source was recognized as."""

    what: str
    """One line, for people."""
    class_names: tuple[str, ...] = ()
    """Every class, of which some may have no input here."""


class Aside(NamedTuple):
    """A file that is not an input: it describes images, or is litter, or was not chosen."""

    kind: str
    """For tallies: its extension, or what it is."""
    name: bytes
    """Finds it inside its source."""


class Input(NamedTuple):
    """One listed input."""

    name: bytes
    """Finds it inside its source."""
    folder: str | None = None
    """The folders that hold it, from the source on, with / between; None or empty: none."""
    label: str | int | LabelSet | None = None
    """Class that the source itself gives: a name, a bare number, or several."""
    offset: int = -1
    """First byte inside an archive, or what else the source needs to find it."""
    size: int = -1
    """Bytes there; -1: unknown until it is read."""
    label_from: str = ""
    """Where in the source `label` was found, such as `column label`."""


class Source(Protocol):
    """Lists its inputs in an order that depends only on its content, and reads any one of them."""

    path: str
    """Path or address, as the user wrote it."""

    @property
    def is_remote(self) -> bool:
        """Whether reading waits for a network: many inputs should be read at a time."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs to open it again in another process, after `inputs` was exhausted."""
        ...

    def inputs(self, spool: Path) -> Iterator["Input | Source | Found | Aside"]:
        """List every input, sources found inside this one, what it was recognized as, and what is left aside.

        Args:
            spool: a file that the source may write, for what cannot be read by ranges where it is.

        Raises:
            ValueError: it must be said first what is wanted of it.
            PackError: the source as a whole cannot be read.
        """
        ...

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of one input.

        Raises:
            Rejected: this input cannot be read.
            PackError: the source as a whole cannot be read any more.
        """
        ...

    def describe(self, name: bytes) -> str:
        """Return where the input came from, for messages: one line of valid UTF-8."""
        ...


def folder_of(name: bytes) -> str | None:
    """Return the folders of a name, as `Input.folder`."""
    return _as_text(name.rpartition(b"/")[0]) or None


_as_text = lru_cache(maxsize=256)(os.fsdecode)  # images of one folder are mostly next to each other


def printable(name: bytes) -> str:
    """Return a name on one line of valid UTF-8; what cannot be printed, and backslashes, become hexadecimal escapes."""
    text = name.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
