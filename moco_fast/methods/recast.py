"""Copies of the key encoder's weights in autocast's precision, cast once per step.

Autocast casts a weight each time it is used, with one kernel per weight, and caches only the casts of weights that
require gradients. Those of the key encoder do not: a ResNet-50 takes 55 small kernels in every forward pass, twice per
step when the loss is symmetric. Here one call casts all weights after each update.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["RecastWeights"]

# Layers with weights that autocast runs in lower precision ("Autocast Op Reference" in torch's docs). Layers that first
# compute on their weight are excluded: weight-standardized convolutions, for example, do so in float32.
_CAST_FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward})


class RecastWeights:
    """Copies of a frozen module's convolution and linear weights; the module itself stays in float32.

    Args:
        module: a module without gradients whose parameters are not replaced afterwards.
        dtype: autocast's dtype, torch.bfloat16 or torch.float16.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._places = [
            (layer, name)
            for layer in module.modules()
            if type(layer).forward in _CAST_FORWARDS
            for name, _ in layer.named_parameters(recurse=False)
        ]
        self._weights: list[Tensor] = [layer.get_parameter(name) for layer, name in self._places]
        self._copies: list[Tensor] = [nn.Parameter(weight.to(dtype), requires_grad=False) for weight in self._weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast all weights again."""
        torch._foreach_copy_(self._copies, self._weights)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - no public name

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Make the module compute with the copies inside this context; results are bit-equal to plain autocast."""
        try:
            self._put(self._copies)
            yield
        finally:
            self._put(self._weights)

    def _put(self, weights: list[Tensor]) -> None:
        # Not by assignment: a module would search all its attributes for the name, for each weight at each step.
        for (layer, name), weight in zip(self._places, weights, strict=True):
            layer._parameters[name] = cast("nn.Parameter", weight)  # pyright: ignore[reportPrivateUsage] - as above
