"""Batch norm with the statistics of virtual groups, or of all ranks, instead of one rank's whole batch."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _CudaSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public name

from moco_fast import distributed
from moco_fast.config import BatchNormConfig
from moco_fast.methods.shuffle import resolve_policy

__all__ = [
    "average_batch_statistics",
    "batch_norm_in_groups",
    "batch_norm_over_ranks",
    "convert_batch_norm",
    "use_group_statistics",
    "use_statistics_of_all_ranks",
]


def batch_norm_in_groups(layer: _BatchNorm, inputs: Tensor, num_groups: int) -> Tensor:
    """Apply batch norm separately to `num_groups` groups of neighboring samples: (B, C, ...) -> (B, C, ...).

    Running statistics take one step of the layer's momentum toward the mean of the groups' statistics, as in the
    authors' SplitBatchNorm.
    """
    assert layer.momentum is not None, "cumulative averages are not supported"
    parts, running_mean, running_var = inputs.chunk(num_groups), layer.running_mean, layer.running_var
    options = (layer.weight, layer.bias, True, layer.momentum, layer.eps)
    if running_mean is None or running_var is None:
        return torch.cat([F.batch_norm(part, None, None, *options) for part in parts])
    means, variances = running_mean.repeat(num_groups, 1), running_var.repeat(num_groups, 1)  # (G, C) each
    outputs = [
        F.batch_norm(part, mean, variance, *options)
        for part, mean, variance in zip(parts, means.unbind(), variances.unbind(), strict=True)
    ]
    running_mean.copy_(means.mean(dim=0))
    running_var.copy_(variances.mean(dim=0))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    return torch.cat(outputs)


def batch_norm_over_ranks(layer: _BatchNorm, inputs: Tensor, *, weighted: bool = True) -> Tensor:
    """Apply batch norm with statistics of all ranks' batches: (B, C, ...) -> (B, C, ...).

    Args:
        layer: whose scale, shift and running statistics count.
        inputs: of this rank. On a CPU, and if not `weighted`, they count as much as any other rank's, whatever their
            size; on a GPU by their size.
        weighted: see above.
    """
    assert layer.momentum is not None, "cumulative averages are not supported"
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    running_mean, running_var = layer.running_mean, layer.running_var
    if inputs.is_cuda and weighted:
        parts = (inputs, layer.weight, layer.bias, running_mean, running_var, layer.eps, layer.momentum)
        return _CudaSyncBatchNorm.apply(*parts, dist.group.WORLD, distributed.world_size())
    num_ranks, axes = distributed.world_size(), [axis for axis in range(inputs.ndim) if axis != 1]
    of_channel = [1, -1] + [1] * (inputs.ndim - 2)
    values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    mean = distributed.sum_over_ranks(values.mean(axes)) / num_ranks
    centered = values - mean.view(of_channel)
    variance = distributed.sum_over_ranks(centered.square().mean(axes)) / num_ranks
    if running_mean is not None and running_var is not None:
        count = num_ranks * inputs.numel() / inputs.shape[1]
        running_mean.lerp_(mean.detach(), layer.momentum)
        running_var.lerp_(variance.detach() * (count / (count - 1)), layer.momentum)
    outputs = centered * (variance + layer.eps).rsqrt().view(of_channel)
    if layer.affine:
        outputs = outputs * layer.weight.view(of_channel) + layer.bias.view(of_channel)
    return outputs.to(inputs.dtype)


class _OtherStatistics(_BatchNorm):
    """Mixin for batch norm layers: other statistics in training, the unchanged layer in evaluation."""

    normalize: Callable[[_BatchNorm, Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is torch's)
        return self.normalize(self, input) if self.training else super().forward(input)


class _OtherBatchNorm1d(_OtherStatistics, nn.BatchNorm1d):
    pass


class _OtherBatchNorm2d(_OtherStatistics, nn.BatchNorm2d):
    pass


class _OtherBatchNormAct2d(_OtherStatistics, BatchNormAct2d):
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is torch's)
        outputs = super().forward(input)
        return self.act(self.drop(outputs)) if self.training else outputs


_CONVERTED: dict[type[nn.Module], type[_OtherStatistics]] = {
    nn.BatchNorm1d: _OtherBatchNorm1d,
    nn.BatchNorm2d: _OtherBatchNorm2d,
    BatchNormAct2d: _OtherBatchNormAct2d,
}


def convert_batch_norm(encoder: nn.Module, bn: BatchNormConfig) -> None:
    """Convert the encoder's batch norms to the statistics that the policy needs, in place; most need no change."""
    policy = resolve_policy(bn)
    if policy == "virtual":
        use_group_statistics(encoder, bn.num_groups)
    elif policy == "sync" and distributed.world_size() > 1:
        use_statistics_of_all_ranks(encoder)


def use_group_statistics(encoder: nn.Module, num_groups: int) -> None:
    """Make every batch norm of `encoder` normalize `num_groups` groups of neighboring samples separately, in place.

    Parameters, buffers, hooks and the keys of the state dict stay the same; evaluation does not change.

    Raises:
        ValueError: the encoder has a batch norm of a type that cannot be converted.
    """
    _convert(encoder, partial(batch_norm_in_groups, num_groups=num_groups))


def use_statistics_of_all_ranks(encoder: nn.Module, *, weighted: bool = True) -> None:
    """Make every batch norm of `encoder` use the statistics of the global batch (SyncBN), in place.

    Unlike torch's own conversion, it also works on the CPU and with timm's layers. See `use_group_statistics`.

    Args:
        encoder: to convert.
        weighted: on a GPU, let ranks count by the size of what they see; otherwise each counts as much as any other, as
            in detectron2's NaiveSyncBatchNorm.

    Raises:
        ValueError: the encoder has a batch norm of a type that cannot be converted.
    """
    # Collectives are not compiled: the graph breaks before them and resumes after them.
    eager = partial(torch.compiler.disable(batch_norm_over_ranks), weighted=weighted)
    _convert(encoder, cast("Callable[[_BatchNorm, Tensor], Tensor]", eager))


def _convert(encoder: nn.Module, normalize: Callable[[_BatchNorm, Tensor], Tensor]) -> None:
    for name, layer in encoder.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if type(layer) not in _CONVERTED:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which supports neither virtual groups nor synchronized "
                "statistics: choose another encoder, or train on several ranks with --bn.policy exchange"
            )
        layer.__class__ = _CONVERTED[type(layer)]
        cast("_OtherStatistics", layer).normalize = normalize


def average_batch_statistics(encoder: nn.Module) -> None:
    """Average running means and variances over ranks; called before evaluation and saving.

    They differ between ranks during training (no buffer is broadcast), so each rank would otherwise evaluate a slightly
    different encoder.
    """
    layers = [layer for layer in encoder.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    distributed.average_(getattr(layer, name) for layer in layers for name in ("running_mean", "running_var"))
