"""The key encoder's weights in autocast's precision, cast once per step.

Autocast casts a weight each time it is used, one kernel for each, and remembers only the casts of weights that are
trained. The key encoder's are not: a ResNet-50 takes 55 small kernels in every forward pass, twice per step where the
loss is symmetric. Here one call casts them all after they have moved.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["RecastWeights"]

# What autocast computes in lower precision, of the layers that have weights ("Autocast Op Reference" in torch's docs).
# Not layers that compute with their weight first, as weight-standardized convolutions do in float32.
_CAST_FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward})


class RecastWeights:
    """Copies of a frozen module's convolution and linear weights; the module itself stays in float32.

    Args:
        module: without gradients, and not replaced afterwards.
        dtype: autocast's: torch.bfloat16 or torch.float16.
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
        """Let the module compute with the copies inside this context: bit for bit as autocast does without them."""
        try:
            self._put(self._copies)
            yield
        finally:
            self._put(self._weights)

    def _put(self, weights: list[Tensor]) -> None:
        # Not by assignment: a module would look the name up in all that it holds, for each weight of each step.
        for (layer, name), weight in zip(self._places, weights, strict=True):
            layer._parameters[name] = cast("nn.Parameter", weight)  # pyright: ignore[reportPrivateUsage] - as said above
