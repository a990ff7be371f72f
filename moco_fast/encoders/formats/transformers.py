"""Format of transformers: folders of its ResNet and ViT (models/resnet and models/vit of huggingface/transformers).

Their tensors are timm's by other names, so timm's networks are built and transformers itself is not needed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, opened, refuse_key, without_head
from moco_fast.encoders.formats.torchvision import open_network, resnet_of
from moco_fast.encoders.weights import load_exactly

__all__ = ["Transformers"]

# What each must say for timm's network to be the same, unless it leaves it out.
_RESNET = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
_VIT = {"hidden_act": "gelu", "qkv_bias": True}


class Transformers:
    """A folder whose config.json says a `model_type`, with or without a classifier."""

    def takes(self, place: Place) -> bool:
        """Such a folder."""
        return "model_type" in place.settings

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Build timm's network of what the configuration says, and load it."""
        refuse_key(place, which)
        kind = place.settings["model_type"]
        if kind not in ("resnet", "vit"):
            raise ValueError(
                f"{place.where} is of transformers' {kind}, but of its networks only resnet and vit are known"
            )
        return (_open_resnet if kind == "resnet" else _open_vit)(place)


def _open_resnet(place: Place) -> OpenedEncoder:
    _refuse_others(place, _RESNET)
    tensors, left_out = _renamed(place, "resnet.", _resnet_name)
    name = resnet_of(tensors, place.where)
    what = f"{place.where} (transformers' {name})"
    return replace(open_network(name, tensors, place.where, what, _images(place)), left_out=left_out)


def _open_vit(place: Place) -> OpenedEncoder:
    _refuse_others(place, _VIT)
    settings = place.settings
    width, heads = settings.get("hidden_size", 768), settings.get("num_attention_heads", 12)
    if width % heads:
        raise ValueError(f"{place.where}: a width of {width} cannot be split into {heads} heads")
    network = VisionTransformer(
        img_size=settings.get("image_size", 224),
        patch_size=settings.get("patch_size", 16),
        embed_dim=width,
        depth=settings.get("num_hidden_layers", 12),
        num_heads=heads,
        mlp_ratio=settings.get("intermediate_size", 3072) / width,
        num_classes=0,
        norm_layer=cast("Any", partial(nn.LayerNorm, eps=settings.get("layer_norm_eps", 1e-12))),
    )
    tensors, left_out = _renamed(place, "vit.", _vit_name)
    # Queries, keys and values are three layers there.
    for name in sorted(name for name in tensors if ".attn.q." in name):
        parts = [tensors.pop(name.replace(".attn.q.", f".attn.{each}."), None) for each in "qkv"]
        if all(part is not None for part in parts):
            tensors[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(cast("list[Tensor]", parts))
    what = f"{place.where} (transformers' vit)"
    load_exactly(network, tensors, what)
    encoder = without_head(network, width, size=int(settings.get("image_size", 224)), **_images(place))
    return opened(encoder, place.where, what, left_out=left_out)


def _refuse_others(place: Place, wanted: Mapping[str, object]) -> None:
    for key, value in wanted.items():
        if place.settings.get(key, value) != value:
            raise ValueError(
                f"{place.where} has {key} {place.settings[key]!r}, but what is built here has {value!r}: its features "
                "would be others"
            )


def _renamed(
    place: Place, prefix: str, rename: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors by timm's names, and the names of those that are left out."""
    tensors = place.weights.tensors
    names = {name: rename(name.removeprefix(prefix)) for name in tensors}
    found = {new: tensors[name] for name, new in names.items() if new is not None}
    return found, tuple(name for name, new in names.items() if new is None)


def _images(place: Place) -> dict[str, Any]:
    """Return mean, std and crop, as preprocessor_config.json says them."""
    assert place.path is not None
    path = place.path / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{place.path} does not say how pixels are normalized: {path.name} is missing")
    told = json.loads(path.read_text())
    if not {"image_mean", "image_std"} <= told.keys():
        raise ValueError(f"{path} does not say how pixels are normalized: there is no image_mean or image_std")
    # Without crop_pct, the whole image is resized.
    return {"mean": told["image_mean"], "std": told["image_std"], "crop": float(told.get("crop_pct") or 1)}


def _resnet_name(name: str) -> str | None:
    name = re.sub(r"^embedder\.embedder\.(convolution|normalization)", _first, name)
    if found := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)", name):
        rest = re.sub(r"^layer\.(\d)\.convolution", lambda layer: f"conv{int(layer[1]) + 1}", found[3])
        rest = re.sub(r"^layer\.(\d)\.normalization", lambda layer: f"bn{int(layer[1]) + 1}", rest)
        rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        return f"layer{int(found[1]) + 1}.{found[2]}.{rest}"
    return None if name.startswith("classifier.") else name


def _first(found: re.Match[str]) -> str:
    return "conv1" if found[1] == "convolution" else "bn1"


_VIT_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_VIT_LAYERS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _vit_name(name: str) -> str | None:
    """Return timm's name; None for what is on top of the token that is taken: a pooler, a classifier."""
    if name.startswith(("classifier.", "pooler.")):
        return None
    if found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"blocks.{found[1]}.{_VIT_LAYERS.get(found[2], found[2])}.{found[3]}"
    stem, _, kind = name.rpartition(".")
    return _VIT_NAMES.get(name) or (f"{_VIT_NAMES[stem]}.{kind}" if stem in _VIT_NAMES else name)
