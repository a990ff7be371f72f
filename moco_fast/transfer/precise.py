"""Precise batch statistics: what a test normalizes with, averaged over batches once the weights stay as they are."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public name

__all__ = ["set_precise_statistics"]


@torch.no_grad()
def set_precise_statistics(model: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Set running means and variances to their means over forward passes (precise_bn.py of facebookresearch/fvcore).

    Args:
        model: in training mode, where each pass updates them.
        passes: each of them runs the model on a batch.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    sums = [[torch.zeros_like(value) for value in _statistics(layer)] for layer in layers]
    num_passes = 0
    for layer in layers:
        layer.momentum = 1.0  # They become those of the batch.
    for run in passes:
        run()
        num_passes += 1
        for layer, of_layer in zip(layers, sums, strict=True):
            for total, value in zip(of_layer, _statistics(layer), strict=True):
                total += value
    assert num_passes
    for layer, of_layer, momentum in zip(layers, sums, momenta, strict=True):
        layer.momentum = momentum
        for total, value in zip(of_layer, _statistics(layer), strict=True):
            value.copy_(total / num_passes)


def _statistics(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var
