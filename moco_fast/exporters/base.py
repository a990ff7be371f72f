"""The contract of an exporter: another library, and the form in which it takes a backbone."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moco_fast.config import Config, ModelConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Exporter"]


class Exporter(Protocol):
    """A library that can load backbones. What is written has the library's own names."""

    def why_not(self, model: ModelConfig) -> str | None:
        """Tell why the library has no such network, or None if it has."""
        ...

    def check_place(self, out: Path) -> None:
        """Refuse a place of the wrong kind, such as a file for a folder. Raises ValueError."""
        ...

    def build(self, model: ModelConfig) -> tuple["nn.Module", str]:
        """Build the library's network without classifier, with weights of no meaning; also return its name there."""
        ...

    def write(self, network: "nn.Module", config: Config, path: Path) -> None:
        """Write a network that `build` made, and how its pixels are normalized."""
        ...

    def read_back(self, model: ModelConfig, path: Path) -> "nn.Module":
        """Load what was written, as `usage` says."""
        ...

    def usage(self, model: ModelConfig, out: Path) -> str:
        """Python lines that load what was written."""
        ...
