"""Common parts of the exporters of ResNet weights: supported networks, tensors and metadata."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moco_fast.config import ModelConfig
from moco_fast.exporters.base import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["ResNetFile", "facts_of", "pixel_statistics", "weights_of"]


class ResNetFile:
    """Base of exporters that write a ResNet's weights to one file; subclasses add `write` and `usage`."""

    place: ClassVar[str] = "encoder.pth"
    has_head: ClassVar[bool] = False
    library: ClassVar[str]

    def networks(self) -> Collection[str]:
        """Return the networks that the library has, by the names that torchvision and timm share."""
        raise NotImplementedError

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Refuse all networks but the library's ResNets with the ImageNet stem."""
        if model is None:
            return (
                f"{self.library} cannot take a network that only its own library builds: export it with --format onnx"
            )
        if model.channels != 3:
            return f"{self.library} takes RGB alone: export this one with --format onnx or torch-export"
        if model.stem != "imagenet":
            return (
                f"{self.library} has no {model.encoder} with a {model.stem} stem: export it with --format onnx or "
                "torch-export, which take every network"
            )
        if model.encoder not in self.networks():
            return f"{self.library} has no {model.encoder} with these parameter names: export it with --format timm"
        return None

    def check(self, out: Path) -> None:
        """Accept a file."""
        check_file(out)

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load it with `open_encoder`, for libraries that are not on the package index."""
        from moco_fast.encoders.open import open_encoder

        del opened
        assert not head
        encoder = open_encoder(str(path)).encoder
        return lambda pixels: (encoder.features(pixels, "backbone"),)


def weights_of(opened: "OpenedEncoder") -> "dict[str, Tensor]":
    """Return the backbone's tensors, by torchvision's names."""
    return {name: tensor.contiguous() for name, tensor in opened.encoder.backbone.state_dict().items()}


def facts_of(opened: "OpenedEncoder") -> str:
    """Return name, normalization, size and crop as JSON, which `open_encoder` reads."""
    model, encoder = opened.model, opened.encoder
    assert model is not None
    facts = {"library": "torchvision", "name": model.encoder, "mean": model.mean, "std": model.std}
    return json.dumps(facts | {"size": encoder.image_size, "crop": encoder.crop})


def pixel_statistics(model: ModelConfig) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of pixels in 0..255."""
    mean, std = ([round(255 * value, 4) for value in values] for values in (model.mean, model.std))
    return mean, std
