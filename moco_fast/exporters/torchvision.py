"""Exporter to torchvision: one .safetensors file with the names of torchvision's ResNets."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.exporters.resnets import ResNetFile, facts_of, weights_of

if TYPE_CHECKING:
    from torch import nn

    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["TorchvisionExporter"]


class TorchvisionExporter(ResNetFile):
    """torchvision's state dict, with the network's name and the normalization of pixels in its metadata."""

    place = "encoder.safetensors"
    library = "torchvision"

    def networks(self) -> Collection[str]:
        """Return the ResNets that have the same name in timm."""
        from moco_fast.encoders.formats.torchvision import RESNETS

        return RESNETS

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        assert not head
        save_file(weights_of(opened), path, metadata={"format": "pt", "architecture": facts_of(opened)})

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load the file into the network."""
        from safetensors.torch import load_file

        from moco_fast.encoders.weights import load_exactly

        assert not head
        network = _build(opened)
        load_exactly(network, load_file(path), "torchvision's network does not take these weights")
        network.eval()
        return lambda pixels: (network(opened.encoder.normalize(pixels)),)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for torchvision."""
        model = opened.model
        assert model is not None
        lines = [
            "import torchvision",
            "from safetensors.torch import load_file",
            f"model = torchvision.models.get_model({model.encoder!r})",
            "# strict=False: the classifier `fc` is yours to train",
            f"model.load_state_dict(load_file({str(out)!r}), strict=False)",
            f"normalize = torchvision.transforms.Normalize(mean={model.mean}, std={model.std})",
        ]
        return "\n".join(lines)


def _build(opened: "OpenedEncoder") -> "nn.Module":
    import torchvision
    from torch import nn

    assert opened.model is not None
    network = torchvision.models.get_model(opened.model.encoder)
    network.fc = nn.Identity()
    return network
