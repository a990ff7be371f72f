"""`moco-fast export`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from moco_fast.exporters.registry import EXPORTERS

__all__ = ["Export"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the encoder without its head as timm or torchvision can load it."""

    run: tyro.conf.Positional[str]
    """Folder of a run (its newest checkpoint counts) or one of its checkpoints/step-*."""
    out: str
    """timm: folder to write; torchvision: file to write (.safetensors)."""
    format: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(EXPORTERS)}}}")] = "timm"
    """Library that shall load it."""

    def execute(self) -> int:
        """Do what the options say; return the exit code."""
        from moco_fast.exporters.write import export

        written = export(self.run, self.format, self.out)
        print(f"{written.path}: {written.num_parameters:,} parameters. To load them:\n\n{written.usage}")
        return 0
