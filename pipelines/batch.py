"""What a loader hands over (contract 3)."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ImageBatch", "TwoViewBatch"]


@dataclass(frozen=True, kw_only=True)
class TwoViewBatch:
    """Two augmented views of this rank's share of a global batch."""

    view_q: Tensor
    """(B, 3, H, W) uint8, channels_last, on this rank's device."""
    view_k: Tensor
    """(B, 3, H, W) uint8, channels_last, on this rank's device."""
    index: Tensor
    """(B,) int64 dense sample numbers, on the host."""
    label: Tensor
    """(B,) int64, -1 where there is none, on the host."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images as they are evaluated: central crops, nothing random."""

    images: Tensor
    """(B, 3, H, W) uint8, channels_last, on this rank's device."""
    index: Tensor
    """(B,) int64 dense sample numbers, on the host."""
    label: Tensor
    """(B,) int64, -1 where there is none, on the host."""
