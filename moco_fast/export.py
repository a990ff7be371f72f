"""Backbones for other libraries: weights under the names that timm or torchvision use, checked by loading them.

The head is left out: it is thrown away after pretraining.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moco_fast.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Export", "Format", "export", "why_not"]

Format = Literal["timm", "torchvision"]

# Our own names for what timm can build: its name, and the options that make the difference.
_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "resnext50_32x8d": ("resnext50_32x4d", {"base_width": 8}),
    "resnet50_w2x": ("resnet50", {"channels": [128, 256, 512, 1024]}),
    "resnet50_w4x": ("resnet50", {"channels": [256, 512, 1024, 2048]}),
    "vit_small": ("vit_small_patch16_224", {"num_heads": 12}),
    "vit_base": ("vit_base_patch16_224", {}),
    "resnet18_half": ("resnet18", {"channels": [32, 64, 128, 256], "stem_type": "deep", "stem_width": 16}),
    "resnet18_quarter": ("resnet18", {"channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}),
}
# Where both libraries give a network the same name and its parameters the same names.
_TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A file that was written, and how to use it."""

    path: Path
    num_parameters: int
    usage: str
    """Python lines that load it."""


def why_not(model: ModelConfig, target: Format) -> str | None:
    """Tell why a library has no such network, or None if it has."""
    if model.stem != "imagenet":
        return (
            f"{target} has no {model.encoder} with a {model.stem} stem: load the checkpoint's model.safetensors itself"
        )
    if target == "torchvision" and model.encoder not in _TORCHVISION:
        return f"torchvision has no {model.encoder} with these parameter names: export it with --format timm"
    return None


def export(run: str | Path, target: Format, out: str | Path) -> Export:
    """Write the backbone of a run's newest checkpoint (or of one checkpoint) as safetensors that `target` can load.

    What is written has been loaded into the library's own network before: every parameter found its place.

    Raises:
        ValueError: no checkpoint, or the library has no such network; nothing is written.
    """
    from safetensors.torch import save_file

    from moco_fast.checkpoint import load_encoder

    config, encoder = load_encoder(run)
    if reason := why_not(config.model, target):
        raise ValueError(reason)
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    weights = {name: tensor.contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    name, options = _TIMM.get(config.model.encoder, (config.model.encoder, {}))
    _check(name, options, target, weights)
    if target == "timm":
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        usage = [
            "import timm",
            "from safetensors.torch import load_file",
            f"model = timm.create_model({name!r}, num_classes=0{arguments})",
            f"model.load_state_dict(load_file({str(out)!r}))",
        ]
    else:
        usage = [
            "import torchvision",
            "from safetensors.torch import load_file",
            f"model = torchvision.models.get_model({name!r})",
            "# strict=False: the classifier `fc` is yours to train",
            f"model.load_state_dict(load_file({str(out)!r}), strict=False)",
        ]
    aside = out.with_name(f".{out.name}.partial")
    architecture = json.dumps({"library": target, "name": name, "options": options})
    save_file(weights, aside, metadata={"format": "pt", "architecture": architecture})
    aside.replace(out)
    num_parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    return Export(path=out, num_parameters=num_parameters, usage="\n".join(usage))


def _check(name: str, options: dict[str, Any], target: Format, weights: dict[str, "Tensor"]) -> None:
    """Load the weights into the library's own network.

    Raises:
        ValueError: a parameter is missing, left over or of another shape.
    """
    import timm
    import torchvision

    if target == "timm":
        network, own = timm.create_model(name, num_classes=0, **options), set[str]()
    else:
        network, own = torchvision.models.get_model(name), {"fc.weight", "fc.bias"}
    try:
        found = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(
            f"{target}'s {name} does not take these weights: {str(error).splitlines()[-1].strip()}"
        ) from None
    wrong = sorted({*found.missing_keys, *found.unexpected_keys} - own)
    if wrong:
        raise ValueError(f"{target}'s {name} does not take these weights: {wrong[0]} is in one only")
