"""Batch that a loader hands over (contract 3)."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's share of a batch: one or more views of every sample."""

    views: tuple[Tensor, ...]
    """(B, 3, H, W) uint8 each, channels_last, on this rank's device; every view has a height and width of its own."""
    index: Tensor
    """(B,) int64 dense sample numbers, on the host."""
    label: Tensor
    """(B,) int64, -1 where there is none, on the host."""
