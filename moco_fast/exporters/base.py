"""Interface of an exporter: another library, and the form in which it loads an encoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moco_fast.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.encoders.open import OpenedEncoder

    Outputs = Callable[[Tensor], Sequence[Tensor]]
    """Pixels (B, 3, H, W) uint8 -> features (B, feature_dim) and, if requested, the head's output (B, dim)."""

__all__ = ["Exporter", "check_file"]


class Exporter(Protocol):
    """Library or runtime that can load encoders. Files use its names for tensors."""

    place: str
    """Default name of the file or folder."""
    has_head: bool
    """Whether the format can hold the projection head."""

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Return why the library lacks a network, or None. `model` None: only the network's own library builds it."""
        ...

    def check(self, out: Path) -> None:
        """Check, before work starts, that `out` has the right kind and the needed packages are installed.

        Raises:
            ValueError: one of them is not so; the message says what to do.
        """
        ...

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the encoder. Raises ValueError: its weights do not fit the library's network."""
        ...

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load what was written, as `usage` says."""
        ...

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return Python lines that load what was written."""
        ...


def check_file(out: Path) -> None:
    """Accept a new or an existing file. Raises ValueError: it is a folder."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder with other contents: choose another path")
