"""Optimizer of a network that is trained from an encoder: its groups of parameters, and their learning rates."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public name
from torch.optim import Optimizer

from moco_fast.optimizers.optim import build_adamw, build_sgd
from moco_fast.transfer.plain_vit import PlainViT
from moco_fast.transfer.presets import TransferPreset

__all__ = ["build_network_optimizer", "lr_at", "set_lr"]

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
_BLOCK, _STAGE = re.compile(r"\.vit\.blocks\.(\d+)\."), re.compile(r"\.layer(\d)\.")
_FIRST = ("backbone.vit.", "backbone.conv1.", "backbone.bn1.")


def build_network_optimizer(model: nn.Module, preset: TransferPreset) -> Optimizer:
    """Build the optimizer of all parameters; those of normalization layers decay if the preset says so.

    A transformer's positions never decay.

    Raises:
        ValueError: SGD is asked to train a vision transformer.
    """
    if preset.optimizer == "sgd" and any(isinstance(layer, PlainViT) for layer in model.modules()):
        raise ValueError(
            "the preset's SGD is for ResNets, and a vision transformer would learn little by it: give --optimizer "
            "adamw, which brings a learning rate, weight decay and layer decay that fit"
        )
    norms = {id(value) for layer in model.modules() if isinstance(layer, _NORMS) for value in layer.parameters()}
    scales = lr_scales((name for name, _ in model.named_parameters()), preset.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        decays = not name.endswith(".pos_embed") and (preset.decays_norms or id(value) not in norms)
        groups.setdefault((scales[name], preset.weight_decay * decays), []).append(value)
    given: list[dict[str, Any]] = [
        {"params": values, "lr_scale": scale, "weight_decay": weight_decay}
        for (scale, weight_decay), values in groups.items()
    ]
    if preset.optimizer == "adamw":
        return build_adamw(given, lr=preset.lr, weight_decay=preset.weight_decay)
    return build_sgd(given, lr=preset.lr, momentum=preset.momentum, weight_decay=preset.weight_decay)


def lr_scales(names: Iterable[str], layer_decay: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied with.

    Patches, tokens and positions, or a ResNet's stem, are layer 0; then come blocks or stages; what the encoder does
    not have is above all of them, at the learning rate itself (`get_vit_lr_decay_rate` of facebookresearch/detectron2).
    """
    layers: dict[str, int | None] = {}
    for name in names:
        if block := _BLOCK.search(name):
            layers[name] = int(block[1]) + 1
        elif stage := _STAGE.search(name):
            layers[name] = int(stage[1])
        else:
            layers[name] = 0 if name.startswith(_FIRST) else None
    top = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: layer_decay ** (top - (top if layer is None else layer)) for name, layer in layers.items()}


def lr_at(preset: TransferPreset, step: int) -> float:
    """Return the learning rate of a step, from 0 (WarmupMultiStepLR of detectron2)."""
    rising = min(1.0, step / preset.warmup_steps) if preset.warmup_steps else 1.0
    drops = sum(step >= round(share * preset.steps) for share in preset.drops)
    return preset.lr * 0.1**drops * (0.001 * (1 - rising) + rising)


def set_lr(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of a step, in each group times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
