"""`moco-fast config-path`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import moco_fast

__all__ = ["ConfigPath", "LaunchConfig"]

LaunchConfig = Literal["cpu-1", "cpu-2", "gpu-1", "gpu-8", "multi-node"]
"""Names of the files in moco_fast/launch."""


@dataclass(frozen=True, kw_only=True)
class ConfigPath:
    """Print where a configuration for `accelerate launch` is installed.

    For example: accelerate launch --config_file $(moco-fast config-path gpu-8) -m moco_fast.train ...
    """

    name: Annotated[tyro.conf.Positional[LaunchConfig], tyro.conf.arg(metavar="{cpu-1,cpu-2,gpu-1,gpu-8,multi-node}")]
    """Processes and devices: `gpu-8` is eight GPUs of one machine. The file says how it is meant; copy it to change
    it."""

    def execute(self) -> int:
        """Print the path; return the exit code."""
        print(Path(moco_fast.__file__).parent / "launch" / f"{self.name}.yaml")
        return 0
