"""Format of timm: networks by name, with weights of the local cache or of a file, and folders as on its hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moco_fast.config import ModelConfig, from_dict
from moco_fast.encoders.encoder import TIMM_NETWORKS, build_backbone, width_of
from moco_fast.encoders.formats.base import (
    OpenedEncoder,
    Place,
    Which,
    opened,
    refuse_key,
    structure,
    without_head,
)
from moco_fast.encoders.weights import listed, load_exactly, read_weights
from moco_fast.methods.base import Method

__all__ = ["Timm"]

# What its hub's folders call their weights.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class Timm:
    """timm's networks: weights alone do not say which they are of, so a name or a config.json does."""

    def takes(self, place: Place) -> bool:
        """A name of timm's, or a folder whose config.json names an architecture."""
        if place.library is not None:
            return place.library == "timm"
        return "architecture" in place.settings

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load the weights into the network that the name or the folder says."""
        refuse_key(place, which)
        if place.library is None:
            settings = place.settings
            told = settings.get("pretrained_cfg", {key: settings[key] for key in settings if key != "architecture"})
            options = settings.get("model_args") or {}
            what = f"{place.where} (timm's {settings['architecture']})"
            found = _open(str(settings["architecture"]), options, dict(told), place.weights.tensors, place.where, what)
            return _with_head(found, place) if "moco_fast" in settings else found
        name = place.network
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture}*")[:3]
            raise ValueError(f"{place.where}: timm has no {architecture}; near are {listed(near) or 'none'}")
        tags = timm.list_pretrained(f"{architecture}.*")
        if tag and name not in tags:
            raise ValueError(f"{place.where}: timm has no weights {name}: there are {listed(tags) or 'none'}")
        told = timm.get_pretrained_cfg(name, allow_unregistered=True)
        cfg = told.to_dict() if told else {}
        if place.path is None:
            path = _cached(name, cfg)
            return _open(architecture, {}, cfg, read_weights(path).tensors, place.where, f"timm's {name}")
        _refuse_authors(place)
        return _open(architecture, {}, cfg, place.weights.tensors, place.where, f"timm's {name} ({place.path})")


def _open(
    architecture: str,
    options: Mapping[str, Any],
    told: dict[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    what: str,
) -> OpenedEncoder:
    """Build a network and load it as timm does, strictly: with a classifier where the weights have one."""
    sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset", "tag")
    told = {key: value for key, value in told.items() if key not in sources}
    classifiers = _classifiers(architecture, told)
    weight = tensors.get(f"{classifiers[0]}.weight")
    num_classes = 0 if weight is None else len(weight)
    # A folder says these, too: the weights know better, and images have three channels.
    options = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
    overlay = told | {"state_dict": dict(tensors), "num_classes": num_classes, "url": None, "hf_hub_id": None}
    try:
        network: Any = timm.create_model(
            architecture, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **options
        )
    except (RuntimeError, AssertionError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{what} does not fit what timm builds: {' '.join(str(error).split())}") from None
    network.pretrained_cfg.pop("state_dict", None)
    left_out: tuple[str, ...] = ()
    if num_classes:
        left_out = tuple(name for name in tensors if name.startswith(tuple(f"{each}." for each in classifiers)))
        network.reset_classifier(0)
    data = resolve_model_data_config(network)
    encoder = without_head(
        network,
        width_of(network),
        mean=data["mean"],
        std=data["std"],
        size=int(data["input_size"][-1]),
        crop=float(data["crop_pct"]),
    )
    return opened(encoder, where, what, model=_model_of(architecture, network, data), left_out=left_out)


def _with_head(found: OpenedEncoder, place: Place) -> OpenedEncoder:
    """Add the head that `moco-fast export --format huggingface --head` put beside timm's files."""
    assert place.path is not None
    path = place.path / "head.safetensors"
    if not path.is_file():
        raise ValueError(f"{place.path} says that it has a projection head, but {path.name} is missing")
    told = place.settings["moco_fast"]
    method = from_dict(told["method"], Method)
    encoder, is_transformer = found.encoder, isinstance(found.encoder.backbone, VisionTransformer)
    head, predictor = method.build_head(encoder.feature_dim, is_transformer=is_transformer)
    encoder.head, encoder.predictor, encoder.dim = head, predictor if told["predictor"] else None, method.dim
    tensors = read_weights(path).tensors
    parts = nn.ModuleDict({"head": head} | ({"predictor": predictor} if predictor and told["predictor"] else {}))
    load_exactly(parts, tensors, str(path))
    return opened(encoder, found.where, found.name, model=found.model, method=method)


def _classifiers(architecture: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classifier's layers: two in a distilled network."""
    cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    name = told.get("classifier") or (cfg.classifier if cfg else None) or "head"
    return (name,) if isinstance(name, str) else tuple(name)


def _model_of(architecture: str, network: nn.Module, data: Mapping[str, Any]) -> ModelConfig | None:
    """Return what we build the same network from, if we can."""
    wanted = structure(network)
    for name in (architecture, *(ours for ours, (theirs, _) in TIMM_NETWORKS.items() if theirs == architecture)):
        with torch.device("meta"):
            if structure(build_backbone(name)) == wanted:
                return ModelConfig(encoder=name, mean=tuple(data["mean"]), std=tuple(data["std"]))
    return None


def _refuse_authors(place: Place) -> None:
    """Refuse MoCo v3's files where a network is named: its ViT-S has 12 heads, timm's 6, and the shapes are equal."""
    if any(name.startswith(("base_encoder.", "momentum_encoder.", "encoder_q.")) for name in place.weights.tensors):
        raise ValueError(
            f"{place.path} is a checkpoint of the MoCo authors' code, which says itself what network it is of (its "
            "ViT-S has 12 heads, timm's has 6): give the file alone"
        )


def _cached(name: str, cfg: Mapping[str, Any]) -> Path:
    from huggingface_hub import try_to_load_from_cache

    if repository := cfg.get("hf_hub_id"):
        for file in (cfg.get("hf_hub_filename"), *_HUB_FILES):
            found = try_to_load_from_cache(repository, file) if file else None
            if isinstance(found, str):
                return Path(found)
    if url := cfg.get("url"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        if path.is_file():
            return path
    if not (cfg.get("hf_hub_id") or cfg.get("url")):
        raise ValueError(f"timm has no weights of {name}: give a file, timm:{name}@FILE")
    raise ValueError(
        f"the weights of timm's {name} are not on this machine, and nothing is downloaded unasked: where there is a "
        f"network, run python -c \"import timm; timm.create_model('{name}', pretrained=True)\", or give a file: "
        f"timm:{name}@FILE"
    )
