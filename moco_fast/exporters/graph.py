"""Exporters of programs that run without our code, from pixels to features, normalization included."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moco_fast.config import ModelConfig
from moco_fast.exporters.base import check_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["Onnx", "TorchExport"]

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class TorchExport:
    """torch.export's program: pixels (B, 3, S, S) uint8 -> features and the head's output; B is dynamic."""

    place: ClassVar[str] = "encoder.pt2"
    has_head: ClassVar[bool] = True

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Accept every network."""
        del model

    def check(self, out: Path) -> None:
        """Accept a file."""
        check_file(out)

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the program."""
        import torch

        program = torch.export.export(
            _graph(opened, head=head), (_pixels(opened),), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
        )
        # torch writes only to a path with its own extension, or to an open file.
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={"images": _images(opened)})

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load it with torch."""
        import torch

        del opened, head
        with path.open("rb") as file, warnings.catch_warnings():
            # torch 2.11 says so of the buffers that it loads.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.export.load(file).module()

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for torch."""
        size = opened.encoder.image_size
        lines = [
            "import torch",
            f"model = torch.export.load({str(out)!r}).module()",
            f"features, *projection = model(pixels)  # (B, 3, {size}, {size}) uint8; normalized within",
        ]
        return "\n".join(lines)


class Onnx:
    """ONNX's program: input `pixels` (B, 3, S, S) uint8, outputs `features` and `projection`; B is dynamic."""

    place: ClassVar[str] = "encoder.onnx"
    has_head: ClassVar[bool] = True

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Accept every network."""
        del model

    def check(self, out: Path) -> None:
        """Accept a file, and check that the packages that write and check it are installed."""
        check_file(out)
        if missing := [name for name in _PACKAGES if find_spec(name) is None]:
            raise ValueError(
                f"--format onnx needs {', '.join(missing)}, which is not installed: pip install 'moco-fast[onnx]'"
            )

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the program with its weights in one file."""
        import torch

        program: Any = torch.onnx.export(
            _graph(opened, head=head),
            (_pixels(opened),),
            dynamo=True,
            verbose=False,
            input_names=["pixels"],
            output_names=["features", "projection"] if head else ["features"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        )
        program.model.metadata_props["images"] = _images(opened)
        program.save(str(path), external_data=False)

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load it with onnxruntime."""
        import onnxruntime
        import torch

        del opened, head
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda pixels: [torch.from_numpy(each) for each in session.run(None, {"pixels": pixels.numpy()})]

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for onnxruntime."""
        size = opened.encoder.image_size
        lines = [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({str(out)!r})",
            f"# pixels: (B, 3, {size}, {size}) uint8; normalized within",
            "features, *projection = session.run(None, {'pixels': pixels})",
        ]
        return "\n".join(lines)


def _graph(opened: "OpenedEncoder", *, head: bool) -> "nn.Module":
    from torch import nn

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = opened.encoder

        def forward(self, pixels: "Tensor") -> "tuple[Tensor, ...]":
            features = self.encoder.features(pixels, "backbone")
            return (features, self.encoder.head(features)) if head else (features,)

    return Graph().eval()


def _pixels(opened: "OpenedEncoder") -> "Tensor":
    import torch

    # With one image, torch would treat the batch size as a constant.
    return torch.zeros(2, 3, opened.encoder.image_size, opened.encoder.image_size, dtype=torch.uint8)


def _images(opened: "OpenedEncoder") -> str:
    return json.dumps({"size": opened.encoder.image_size, "crop": opened.encoder.crop, "of": opened.name})
