"""Weights that a run starts from in place of random ones: those of an encoder with the same backbone, from anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast.config import Config
from moco_fast.encoders.encoder import build_encoder
from moco_fast.encoders.open import open_encoder

__all__ = ["InitialWeights", "initial_weights"]

# What changes a layer's function, but not the shapes of its parameters.
_FUNCTION = ("num_heads", "kernel_size", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """Weights of the backbone, and of head and predictor where they fit."""

    tensors: dict[str, Tensor]
    """By the names of the run's query encoder."""
    facts: dict[str, Any]
    """What the run records of them: where, name, digest, parts, and notes for people."""


def initial_weights(config: Config) -> InitialWeights | None:
    """Load what --run.init-from names; None: it names nothing. No generator of torch's is touched.

    Raises:
        ValueError: there is no such encoder, or its backbone is another network than --model.encoder.
    """
    where = config.run.init_from
    if where is None:
        return None
    opened = open_encoder(where, image_size=config.views.size)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        own = build_encoder(config.model, config.method, image_size=config.views.size)
    theirs = opened.encoder
    if reason := _difference(own.backbone, theirs.backbone):
        stem = f" with the {config.model.stem} stem" if config.model.stem != "imagenet" else ""
        raise ValueError(
            f"--run.init-from {opened.name} is another network than --model.encoder {config.model.encoder}{stem}: "
            f"{reason}"
        )
    notes: list[str] = []
    parts = ["backbone"]
    for name in ("head", "predictor"):
        wanted, there = getattr(own, name), getattr(theirs, name)
        if wanted is None:
            continue
        if there is not None and len(there.state_dict()) and not (reason := _difference(wanted, there)):
            parts.append(name)
        else:
            notes.append(f"the {name} starts with random weights: {reason or 'there is none'}")
    if not all(
        torch.allclose(getattr(theirs, each), _of_config(config)[each]) for each in ("pixel_scale", "pixel_shift")
    ):
        notes.append("it was trained on pixels of another mean and deviation than --model.mean and --model.std")
    facts = {"where": where, "name": opened.name, "digest": opened.digest, "parts": parts, "notes": notes}
    tensors = {key: value for key, value in theirs.state_dict().items() if key.partition(".")[0] in parts}
    return InitialWeights(tensors=tensors, facts=facts)


def _of_config(config: Config) -> dict[str, Tensor]:
    mean, std = torch.tensor(config.model.mean), torch.tensor(config.model.std)
    return {"pixel_scale": 1 / (255 * std), "pixel_shift": -mean / std}


def _difference(own: nn.Module, theirs: nn.Module) -> str:
    """Say the first thing in which two networks differ; empty: they are the same."""
    shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (own, theirs)]
    for name in dict.fromkeys((*shapes[0], *shapes[1])):
        ours, other = (each.get(name) for each in shapes)
        if ours != other:
            return f"{name} is {_written(other)} there, {_written(ours)} here"
    layers = [dict(each.named_modules()) for each in (own, theirs)]
    for name, layer in layers[0].items():
        ours, other = _function(layer), _function(layers[1].get(name))
        if ours != other:
            return f"{name or 'it'} is a {_told(other)} there, a {_told(ours)} here"
    return ""


def _function(layer: nn.Module | None) -> dict[str, Any]:
    if layer is None or next(layer.parameters(), None) is None:
        return {}
    return {"type": type(layer).__qualname__} | {key: getattr(layer, key) for key in _FUNCTION if hasattr(layer, key)}


def _told(function: Mapping[str, object]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in function.items() if key != "type")
    return f"{function.get('type', 'layer')}{f' ({rest})' if rest else ''}"


def _written(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"
