"""Exporter to torchvision: one .safetensors file whose names are those of torchvision's ResNets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.config import Config, ModelConfig
from moco_fast.encoders.formats.torchvision import RESNETS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Torchvision"]


class Torchvision:
    """torchvision's state dict, with the network's name and the pixels' normalization in its metadata."""

    def why_not(self, model: ModelConfig) -> str | None:
        """It has the ResNets that timm calls by the same name."""
        if model.stem != "imagenet":
            return (
                f"torchvision has no {model.encoder} with a {model.stem} stem: load the checkpoint's model.safetensors "
                "itself"
            )
        if model.encoder not in RESNETS:
            return f"torchvision has no {model.encoder} with these parameter names: export it with --format timm"
        return None

    def check_place(self, out: Path) -> None:
        """Take a new file, or an earlier one."""
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder that holds something else: name another place")

    def build(self, model: ModelConfig) -> tuple["nn.Module", str]:
        """Build torchvision's network without its classifier."""
        import torchvision
        from torch import nn

        network = torchvision.models.get_model(model.encoder)
        network.fc = nn.Identity()
        return network, model.encoder

    def write(self, network: "nn.Module", config: Config, path: Path) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        model = config.model
        facts = {"library": "torchvision", "name": model.encoder, "mean": model.mean, "std": model.std}
        pixels = {"size": config.views.size, "crop": config.eval.crop}
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", "architecture": json.dumps(facts | pixels)})

    def read_back(self, model: ModelConfig, path: Path) -> "nn.Module":
        """Load the file into the network."""
        from safetensors.torch import load_file

        network, _ = self.build(model)
        network.load_state_dict(load_file(path))
        return network

    def usage(self, model: ModelConfig, out: Path) -> str:
        """Lines for torchvision."""
        lines = [
            "import torchvision",
            "from safetensors.torch import load_file",
            f"model = torchvision.models.get_model({model.encoder!r})",
            "# strict=False: the classifier `fc` is yours to train",
            f"model.load_state_dict(load_file({str(out)!r}), strict=False)",
            f"normalize = torchvision.transforms.Normalize(mean={model.mean}, std={model.std})",
        ]
        return "\n".join(lines)
