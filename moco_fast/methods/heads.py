"""Projection heads on top of a backbone, and predictors on top of those."""

from itertools import pairwise

from torch import nn

__all__ = ["linear_head", "mlp_head", "mlp_with_batch_norm"]


def linear_head(feature_dim: int, dim: int) -> nn.Module:
    """Build MoCo v1's projection: (B, feature_dim) -> (B, dim)."""
    return nn.Linear(feature_dim, dim)


def mlp_head(feature_dim: int, dim: int) -> nn.Module:
    """Build MoCo v2's projection: (B, feature_dim) -> (B, dim)."""
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))


def mlp_with_batch_norm(
    widths: list[int], *, last_norm: bool, hidden_bias: bool = False, last_bias: bool = False
) -> nn.Module:
    """Build linear layers with batch norm and ReLU between them: (B, widths[0]) -> (B, widths[-1]).

    Args:
        widths: sizes of the input and of every layer's output.
        last_norm: end with a batch norm without scale and shift.
        hidden_bias: give biases to the linear layers before a batch norm.
        last_bias: give a bias to the last linear layer.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out, bias=hidden_bias), nn.BatchNorm1d(width_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
