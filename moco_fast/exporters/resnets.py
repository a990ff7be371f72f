"""What exporters of ResNets' weights share: which there are, their tensors, and what is told beside them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moco_fast.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.encoders.open import OpenedEncoder

__all__ = ["facts_of", "weights_of", "why_no_resnet"]


def why_no_resnet(library: str, model: ModelConfig | None, known: Sequence[str]) -> str | None:
    """Tell why a library has no such ResNet, or None if it has."""
    if model is None:
        return f"{library} cannot take a network that only its own library builds: export it with --format onnx"
    if model.stem != "imagenet":
        return (
            f"{library} has no {model.encoder} with a {model.stem} stem: load the checkpoint's model.safetensors itself"
        )
    if model.encoder not in known:
        return f"{library} has no {model.encoder} with these parameter names: export it with --format timm"
    return None


def weights_of(opened: "OpenedEncoder") -> "dict[str, Tensor]":
    """Return the backbone's tensors by torchvision's names."""
    return {name: tensor.contiguous() for name, tensor in opened.encoder.backbone.state_dict().items()}


def facts_of(opened: "OpenedEncoder") -> str:
    """Return name, normalization, size and crop as JSON, which `open_encoder` reads again."""
    model, encoder = opened.model, opened.encoder
    assert model is not None
    facts = {"library": "torchvision", "name": model.encoder, "mean": model.mean, "std": model.std}
    return json.dumps(facts | {"size": encoder.image_size, "crop": encoder.crop})
