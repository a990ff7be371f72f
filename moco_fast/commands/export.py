"""Command `moco-fast export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from moco_fast.exporters.registry import EXPORTERS

__all__ = ["Export"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write an encoder in another library's format, load it again, and compare its outputs with the encoder's."""

    encoder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENCODER")]
    """Folder of a run (its newest checkpoint is used), one of its checkpoints/step-*, a file of the MoCo authors, or
    anything else that docs/encoders.md lists."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE|FOLDER")]
    """timm, huggingface: folder to write; otherwise: file to write (torchvision: .safetensors, onnx: .onnx,
    torch-export: .pt2, detectron2, mmdet: .pth)."""
    format: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(EXPORTERS)}}}")] = "timm"
    """Library or runtime that will load the encoder."""
    head: bool = False
    """Also write the projection head (huggingface, onnx, torch-export)."""
    which: Literal["query", "key"] = "query"
    """The trained encoder (query), or its moving average (key)."""
    image_size: int | None = None
    """Side of the images that the encoder will process, in pixels; unset: as it was trained."""

    def execute(self) -> int:
        """Export; return the exit code."""
        from moco_fast.exporters.write import export

        written = export(
            self.encoder, self.format, self.out, head=self.head, which=self.which, image_size=self.image_size
        )
        print(f"{written.path}: {written.num_parameters:,} parameters. To load them:\n\n{written.usage}")
        return 0
