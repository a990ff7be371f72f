"""Sources of images as the packer sees them: the protocol, and what it lists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["Found", "Input", "LabelSet", "Source", "printable"]


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


class Input(NamedTuple):
    """One listed input."""

    name: bytes
    """Finds it inside its source."""
    folder: str | None = None
    """Name of the folder that holds it."""
    label: str | int | LabelSet | None = None
    """Class that the source itself gives: a name, a bare number, or several."""
    offset: int = -1
    """First byte inside an archive, or what else the source needs to find it."""
    size: int = -1
    """Bytes there; -1: unknown until it is read."""


class Source(Protocol):
    """Lists its inputs in an order that depends only on its content, and reads any one of them."""

    is_remote: bool
    """Reading waits for a network: many inputs should be read at a time."""

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs to open it again in another process, after `inputs` was exhausted."""
        ...

    def inputs(self, spool: Path) -> Iterator["Input | Source | Found"]:
        """List every input, sources found inside this one, and what it was recognized as.

        Args:
            spool: a file that the source may write, for what cannot be read by ranges where it is.

        Raises:
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


def printable(name: bytes) -> str:
    """Return a name on one line of valid UTF-8; what cannot be printed, and backslashes, become hexadecimal escapes."""
    text = name.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
