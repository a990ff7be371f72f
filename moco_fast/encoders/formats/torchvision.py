"""Format of torchvision: networks by name, files of its ResNets, and what `moco-fast export` writes for it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn

from moco_fast.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from moco_fast.encoders.encoder import build_backbone, width_of
from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, opened, refuse_key, without_head
from moco_fast.encoders.weights import listed, load_exactly, read_weights

__all__ = ["RESNETS", "Torchvision", "exported_facts", "open_network", "resnet_of"]

RESNETS = (
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
"""Networks that torchvision and timm call by the same name, with the same names of parameters."""

_CLASSIFIER = ("fc.weight", "fc.bias")


class Torchvision:
    """torchvision's state dicts. Of ResNets the shapes say which; other networks are named."""

    def takes(self, place: Place) -> bool:
        """A name of torchvision's, or a file with the names of its ResNets."""
        if place.library is not None:
            return place.library == "torchvision"
        # timm's ResNets with another stem or with attention have names of their own.
        return place.is_file and {"conv1.weight", "layer1.0.conv1.weight"} <= place.weights.tensors.keys()

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load a file into the network that it is of, or that is named."""
        refuse_key(place, which)
        if place.library is not None:
            return _open_named(place)
        weights = place.weights
        facts = exported_facts(weights.facts)
        name = str(facts.pop("name", "")) or resnet_of(weights.tensors, place.where)
        return open_network(name, weights.tensors, place.where, f"{place.where} (torchvision's {name})", facts)


def resnet_of(tensors: Mapping[str, Tensor], what: str) -> str:
    """Return the name of the ResNet that tensors are of, by their names and shapes; a classifier does not count.

    Raises:
        ValueError: it is none of `RESNETS`; with how it differs from the nearest.
    """
    shapes = {(name, tensor.shape) for name, tensor in tensors.items() if not name.startswith("fc.")}
    shapes = {each for each in shapes if not each[0].endswith("num_batches_tracked")}

    def distance(name: str) -> int:
        with torch.device("meta"):
            network = torchvision.models.get_model(name).state_dict()
        own = {(key, tensor.shape) for key, tensor in network.items() if key not in _CLASSIFIER}
        return len({each for each in own if not each[0].endswith("num_batches_tracked")} ^ shapes)

    distances = {name: distance(name) for name in RESNETS}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest]:
        with torch.device("meta"):
            network = build_backbone(nearest)
        load_exactly(
            network,
            {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")},
            f"{what} looks like a ResNet, but is none of {', '.join(RESNETS)}. Beside the nearest, {nearest}",
        )
    return nearest


def open_network(
    name: str, tensors: Mapping[str, Tensor], where: str, what: str, images: Mapping[str, Any]
) -> OpenedEncoder:
    """Load tensors into a network of torchvision's; `images` says mean, std, size and crop, if known."""
    backbone, feature_dim, classifier = _build(name)
    left_out = tuple(key for key in tensors if key.startswith(f"{classifier}."))
    load_exactly(backbone, {key: tensor for key, tensor in tensors.items() if key not in left_out}, what)
    encoder = without_head(backbone, feature_dim, **images)
    mean, std = (tuple(images.get(key, known)) for key, known in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    model = ModelConfig(encoder=name, mean=mean, std=std) if name in RESNETS else None
    return opened(encoder, where, what, model=model, left_out=left_out)


def _build(name: str) -> tuple[nn.Module, int, str]:
    """Build a network without its classifier: the network, the size of its features, and the classifier's name."""
    if name in RESNETS:
        # timm's is the same network, and gives what is between its stages, too.
        backbone = build_backbone(name)
        return backbone, width_of(backbone), "fc"
    network = torchvision.models.get_model(name)
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"torchvision's {name} ends in no linear layer, so it has no features to take")
    parent, _, attribute = linear[-1].rpartition(".")
    features = network.get_submodule(linear[-1]).in_features
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return network, int(features), linear[-1]  # pyright: ignore[reportArgumentType] - a linear layer's


def exported_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `moco-fast export` wrote into the file's metadata: name, mean, std, size, crop; or nothing."""
    try:
        told = json.loads(facts.get("architecture", "{}"))
        return {key: told[key] for key in ("name", "mean", "std", "size", "crop") if key in told}
    except (TypeError, ValueError):
        return {}


def _open_named(place: Place) -> OpenedEncoder:
    name, _, tag = place.network.partition(".")
    if name not in torchvision.models.list_models(module=torchvision.models):
        near = [each for each in torchvision.models.list_models(module=torchvision.models) if name[:6] in each]
        raise ValueError(f"{place.where}: torchvision has no {name}; near are {listed(near) or 'none'}")
    known = torchvision.models.get_model_weights(name)
    tags = [each.name for each in known]
    if tag and tag not in tags:
        raise ValueError(f"{place.where}: torchvision has no weights {tag} of {name}: there are {listed(tags)}")
    chosen = known[tag] if tag else known.DEFAULT  # pyright: ignore[reportAttributeAccessIssue] - an enum's alias
    path = place.path or _cached(name, chosen.name, chosen.url)
    transforms = chosen.transforms()
    size, resized = transforms.crop_size[0], transforms.resize_size[0]
    images = {"mean": transforms.mean, "std": transforms.std, "size": size, "crop": size / resized}
    weights = read_weights(path)
    what = f"torchvision's {name} ({place.path or chosen.name})"
    return open_network(name, weights.tensors, place.where, what, images)


def _cached(name: str, tag: str, url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        raise ValueError(
            f"the weights of torchvision's {name} are not on this machine ({path}), and nothing is downloaded unasked: "
            f"where there is a network, run python -c \"import torchvision; torchvision.models.get_model('{name}', "
            f"weights='{tag}')\", or give a file: torchvision:{name}@FILE"
        )
    return path
