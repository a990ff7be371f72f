"""Layers of an encoder by name, and what comes out of several of them in one forward pass. Free of torch until it runs.

backbone        pooled features, as every encoder gives them
head            the projection head's output
stage1..stage5  a ResNet's stem and its four stages, averaged over the picture
stage3/9216     the same, averaged over the finest square grid that gives at most so many numbers (9,216 is what the
                linear benchmark of every stage takes: Goyal et al. 2019; multi_pooling.py of open-mmlab/mmselfsup)
last4           class tokens of a vision transformer's last four blocks side by side, each after the network's last norm
                (eval_linear.py of facebookresearch/dino); any number
patches         one vector for each place: a vision transformer's patch tokens, a ResNet's last map
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moco_fast.encoders.encoder import Encoder

__all__ = ["check_layer", "layer_features", "layer_shapes"]

_LAYER = re.compile(r"backbone|head|patches|stage([1-5])(?:/([1-9]\d*))?|last([1-9]\d*)")


def check_layer(name: str) -> str:
    """Return the name. Raises ValueError where it is not that of a layer."""
    if _LAYER.fullmatch(name) is None:
        raise ValueError(
            f"there is no layer {name!r}: give backbone, head, patches, stage1 to stage5, stage3/9216 for at most "
            "9,216 numbers of a stage, or last4 for a vision transformer's last four blocks"
        )
    return name


def layer_features(encoder: "Encoder", images: "Tensor", layers: Sequence[str]) -> "dict[str, Tensor]":
    """Compute what comes out of several layers, in one pass through the backbone.

    Args:
        encoder: in the mode that is wanted.
        images: (B, 3, H, W) uint8.
        layers: names as at the top of this file.

    Returns:
        by layer: (B, D), not of length 1; `patches`: (B, P, D).

    Raises:
        ValueError: the encoder does not have one of the layers.
    """
    taps = {layer: tap for layer in layers if (tap := _tap(encoder, layer)) is not None}
    with _outputs({layer: modules for layer, (modules, _) in taps.items()}) as outputs:
        pooled = encoder.backbone(encoder.normalize(images))
    found = {layer: shape(*outputs[layer]) for layer, (_, shape) in taps.items()}
    if "backbone" in layers:
        found["backbone"] = pooled
    if "head" in layers:
        found["head"] = encoder.head(pooled)
    return {layer: found[layer] for layer in layers}


def layer_shapes(encoder: "Encoder", layers: Sequence[str], *, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample's features by layer, for images of `size` pixels; looks at an empty image."""
    import torch

    known = {"backbone": (encoder.feature_dim,), "head": (encoder.dim,)}
    if known.keys() >= set(layers):
        return {layer: known[layer] for layer in layers}
    device = encoder.pixel_scale.device
    with torch.no_grad():
        found = layer_features(encoder, torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), layers)
    return {layer: tuple(values.shape[1:]) for layer, values in found.items()}


Shape = Callable[..., "Tensor"]


def _tap(encoder: "Encoder", layer: str) -> "tuple[Sequence[nn.Module], Shape] | None":
    """Return the modules whose outputs a layer is made of, and how; None for those that every encoder has."""
    matched = _LAYER.fullmatch(check_layer(layer))
    assert matched is not None
    backbone = encoder.backbone
    if layer == "patches":
        return _patches_tap(backbone)
    if matched[3] is not None:
        return _last_tap(backbone, int(matched[3]))
    if matched[1] is None:
        return None
    names = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    if not all(hasattr(backbone, name) for name in names):
        raise ValueError(f"the encoder is not a ResNet, so it has no {layer}: use the layers backbone, head or patches")
    at_most = None if matched[2] is None else int(matched[2])
    return [getattr(backbone, names[int(matched[1]) - 1])], lambda maps: _pooled(maps, at_most)


def _last_tap(backbone: "nn.Module", num: int) -> "tuple[Sequence[nn.Module], Shape]":
    module: Any = backbone
    if not getattr(module, "has_class_token", False) or not hasattr(module, "blocks"):
        raise ValueError(f"the encoder is not a vision transformer with a class token, so it has no last{num}")
    if num > len(module.blocks):
        raise ValueError(f"the encoder has {len(module.blocks)} blocks, so it has no last{num}: name fewer")
    blocks = list(module.blocks)[-num:]

    def side_by_side(*outputs: "Tensor") -> "Tensor":
        import torch

        return torch.cat([module.norm(tokens)[:, 0] for tokens in outputs], dim=1)

    return blocks, side_by_side


def _patches_tap(backbone: "nn.Module") -> "tuple[Sequence[nn.Module], Shape]":
    module: Any = backbone
    if hasattr(backbone, "patch_embed") and hasattr(backbone, "norm"):
        return [module.norm], lambda tokens: tokens[:, module.num_prefix_tokens :]
    if hasattr(backbone, "layer4"):
        return [module.layer4], lambda maps: maps.flatten(2).transpose(1, 2)
    raise ValueError("the encoder is neither a vision transformer nor a ResNet, so it has no patches: use backbone")


def _pooled(maps: "Tensor", at_most: int | None) -> "Tensor":
    """(B, C, H, W) -> (B, C) or (B, C * G * G) with the largest grid G that fits."""
    if at_most is None:
        return maps.mean(dim=(2, 3))
    from torch.nn.functional import adaptive_avg_pool2d

    channels, height, width = maps.shape[1:]
    side = max(1, min(isqrt(at_most // channels), height, width))
    return adaptive_avg_pool2d(maps, side).flatten(1)


@contextmanager
def _outputs(modules: "Mapping[str, Sequence[nn.Module]]") -> "Generator[dict[str, list[torch.Tensor]]]":
    """Keep what passes through modules, in their order: their output, or what a pooling layer is given."""
    outputs: dict[str, Any] = {layer: [] for layer in modules}

    def keep_output(layer: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[layer].append(output)

        return hook

    def keep_input(layer: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any) -> None:
            outputs[layer].append(inputs[0])

        return hook

    handles = [
        # The stem's output is what the pooling after it takes; with the CIFAR stem that is no pooling at all.
        module.register_forward_pre_hook(keep_input(layer))
        if layer.startswith("stage1")
        else module.register_forward_hook(keep_output(layer))
        for layer, of_layer in modules.items()
        for module in of_layer
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
