"""Momentum encoder: the key encoder as a moving average of the query encoder (MoCo v1, equation 2)."""

import copy

import torch
from torch import Tensor, nn

from moco_fast.encoders.encoder import Encoder

__all__ = ["MomentumUpdate", "copy_as_key_encoder"]


def copy_as_key_encoder(query: Encoder) -> Encoder:
    """Return the initial key encoder: a copy of the query encoder without predictor, in float32, without gradients.

    Call it after the query encoder's weights, memory format and batch-norm policy are final: the fused update needs
    equal strides.
    """
    key = copy.deepcopy(query)
    key.predictor = None
    return key.requires_grad_(False)


class MomentumUpdate:
    """k <- m k + (1 - m) q for every parameter of the key encoder, in one fused pass.

    Buffers are not averaged, as in the authors' code: each encoder's come from its own forward passes.
    """

    def __init__(self, query: nn.Module, key: nn.Module):
        of_query = dict(query.named_parameters())
        names = [name for name, _ in key.named_parameters()]
        assert of_query.keys() >= set(names), "the key encoder has parameters that the query encoder lacks"
        self._key: list[Tensor] = list(key.parameters())
        self._query: list[Tensor] = [of_query[name] for name in names]
        for name, k, q in zip(names, self._key, self._query, strict=True):
            assert k.dtype in (torch.float32, torch.float64), (
                f"{name} of the key encoder is {k.dtype}, which is too coarse for the momentum update"
            )
            assert k.stride() == q.stride(), f"{name} has different strides in the two encoders"

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        """Update once with momentum m."""
        torch._foreach_lerp_(self._key, self._query, 1 - momentum)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - no public name
