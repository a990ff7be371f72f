"""The contract of an exporter: another library, and the form in which it takes an encoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moco_fast.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.encoders.open import OpenedEncoder

    Outputs = Callable[[Tensor], Sequence[Tensor]]
    """Pixels (B, 3, H, W) uint8 to features (B, feature_dim) and, if asked, the head's output (B, dim)."""

__all__ = ["Exporter", "check_file"]


class Exporter(Protocol):
    """A library, or a runtime, that can load encoders. What is written has its own names."""

    place: str
    """What the file or folder may be called."""
    has_head: bool
    """There is a place for the projection head."""

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Tell why the library has no such network, or None if it has. `model` None: only its own library builds it."""
        ...

    def check(self, out: Path) -> None:
        """Refuse what cannot work, before it is begun: a place of the wrong kind, packages that are not installed.

        Raises:
            ValueError: with the way out.
        """
        ...

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the encoder. Raises ValueError: its weights do not fit the library's network."""
        ...

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load what was written, as `usage` says."""
        ...

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Python lines that load what was written."""
        ...


def check_file(out: Path) -> None:
    """Take a new file, or an earlier one. Raises ValueError: it is a folder."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder that holds something else: name another place")
