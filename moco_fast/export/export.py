"""Backbones for other libraries: weights under the names that timm or torchvision use, checked by their features.

The head is left out: it is thrown away after pretraining.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from moco_fast.config import Config, ModelConfig
from shards.ground.files import appearing, remove

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moco_fast.encoders.encoder import Encoder

__all__ = ["Export", "Format", "export", "library_network", "why_not"]

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
_TIMM_FILES = ("config.json", "model.safetensors")
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
    """What was written, a file or a folder, and how to use it."""

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
    """Write the backbone of a run's newest checkpoint (or of one checkpoint) so that `target` can load it.

    For timm a folder, whose config.json says what `timm.create_model` has to build (the weights of a transformer fit
    networks with other numbers of heads, too) and how its pixels are normalized; for torchvision a file. What is
    written has been loaded as a user loads it and gives the encoder's features.

        written = export("runs/first", "timm", "encoder")
        print(written.usage)

    Raises:
        ValueError: no checkpoint, no place to write to, or the library has no such network; nothing is written.
    """
    from moco_fast.training.checkpoint import load_encoder

    config, encoder = load_encoder(run)
    if reason := why_not(config.model, target):
        raise ValueError(reason)
    out = Path(out)
    _check_place(out, target)
    network = library_network(config.model, encoder.backbone.state_dict(), target)
    with appearing(out, durable=False) as aside:
        _write(network, config, target, aside)
        _compare(encoder, _read_back(config.model, target, aside), config.views.size, target)
        remove(out)
    num_parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    return Export(path=out, num_parameters=num_parameters, usage=_usage(config.model, target, out))


def _check_place(out: Path, target: Format) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    if target == "timm" and (out.suffix == ".safetensors" or out.is_file()):
        raise ValueError(
            f"--out {out}: timm loads a folder, which says beside the weights what network they are of: name a folder"
        )
    if out.is_dir() and (target == "torchvision" or {path.name for path in out.iterdir()} - set(_TIMM_FILES)):
        raise ValueError(f"--out {out} is a folder that holds something else: name another place")


def library_network(model: ModelConfig, weights: Mapping[str, "Tensor"], target: Format) -> "nn.Module":
    """Build the library's network for a backbone, without classifier, and load the backbone's weights into it.

    Raises:
        ValueError: a parameter is missing, left over or of another shape.
    """
    network, name = _bare_network(model, target)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{target}'s {name} does not take these weights: {str(error).splitlines()[-1].strip()}"
        ) from None
    return network


def _bare_network(model: ModelConfig, target: Format) -> tuple["nn.Module", str]:
    import timm
    import torchvision
    from torch import nn

    if target == "timm":
        name, options = _TIMM.get(model.encoder, (model.encoder, {}))
        return timm.create_model(name, num_classes=0, **options), name
    network = torchvision.models.get_model(model.encoder)
    network.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue] - all of _TORCHVISION have one
    return network, model.encoder


def _write(network: "nn.Module", config: Config, target: Format, path: Path) -> None:
    model = config.model
    if target == "torchvision":
        from safetensors.torch import save_file

        facts = json.dumps({"library": target, "name": model.encoder, "mean": model.mean, "std": model.std})
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", "architecture": facts})
        return
    from timm.models import save_for_hf

    # What timm tells of weights of its own is not true of these.
    about_its_own = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes")
    told = cast("dict[str, Any]", network.pretrained_cfg)
    cast("Any", network).pretrained_cfg = {key: told[key] for key in told.keys() - about_its_own}
    size, crop = config.views.size, config.eval.crop
    images = {"mean": model.mean, "std": model.std, "input_size": (3, size, size), "crop_pct": crop}
    _, options = _TIMM.get(model.encoder, (model.encoder, {}))
    save_for_hf(
        network,
        str(path),
        model_args=options,
        safe_serialization=True,
        data_config=images | {"interpolation": "bilinear"},
    )


def _read_back(model: ModelConfig, target: Format, path: Path) -> "nn.Module":
    """Load what was written as `_usage` says."""
    if target == "timm":
        import timm

        return timm.create_model(f"local-dir:{path}", pretrained=True)
    from safetensors.torch import load_file

    return library_network(model, load_file(path), target)


def _compare(encoder: "Encoder", network: "nn.Module", size: int, target: Format) -> None:
    """Hold the features of what was read back against the encoder's, for pixels without meaning.

    Raises:
        ValueError: they differ, so the library's network is another one with weights of the same shapes; or they are
            not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = encoder.features(images, "backbone")
        found = network.eval()(encoder.normalize(images))
    if not expected.isfinite().all():
        raise ValueError("the encoder's features are not finite: it has diverged, export an earlier checkpoint")
    apart = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    if not apart <= 1e-3 * expected.abs().max().item():
        raise ValueError(
            f"{target} builds another network for these weights: features are up to {apart:.3g} apart from the "
            "encoder's. Load the checkpoint's model.safetensors with moco_fast.training.checkpoint.load_encoder"
        )


def _usage(model: ModelConfig, target: Format, out: Path) -> str:
    if target == "timm":
        lines = [
            "import timm",
            f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True)",
            "# mean and std of its pixels: timm.data.resolve_model_data_config(model)",
        ]
    else:
        lines = [
            "import torchvision",
            "from safetensors.torch import load_file",
            f"model = torchvision.models.get_model({model.encoder!r})",
            "# strict=False: the classifier `fc` is yours to train",
            f"model.load_state_dict(load_file({str(out)!r}), strict=False)",
            f"normalize = torchvision.transforms.Normalize(mean={model.mean}, std={model.std})",
        ]
    return "\n".join(lines)
