"""Shuffling BN: policies that decide among which samples keys are computed (MoCo v1, section 3.3).

If a query and its key were computed in the same batch, they would share batch-norm statistics, and the encoders would
learn to recognize those instead of the image. So keys are computed among other samples than their queries. A policy has
two halves: `shuffle` rearranges the key images before the key encoder, `unshuffle` restores the order of the keys.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast import distributed
from moco_fast.config import BatchNormConfig

__all__ = [
    "Exchange",
    "Gather",
    "KeyPolicy",
    "Together",
    "VirtualGroups",
    "build_policy",
    "exchange_group",
    "resolve_policy",
]


class KeyPolicy(Protocol):
    """Policy for the batches in which keys are computed. Both methods keep shape and dtype; neither has gradients."""

    def shuffle(self, images: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) that this rank's key encoder processes, given the rank's key images."""
        ...

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Return the keys of this rank's own images, in order, given the key encoder's output (B, D)."""
        ...


class Together:
    """Compute keys in the batch of their queries: right without batch norm, or with a synchronized one."""

    def shuffle(self, images: Tensor) -> Tensor:
        """Return the images unchanged."""
        return images

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Return the keys unchanged."""
        return keys


class Exchange:
    """Send an equal part of each rank's key images to every rank of the group, and receive their keys.

    A rank then computes keys for 1 / W of its own images, the same share as the paper's permutation on average. The
    loader permutes every rank's batch at each step, so these are different samples each time.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group

    def shuffle(self, images: Tensor) -> Tensor:
        """Send part j of this rank's images to rank j."""
        return distributed.exchange_rows(images, self._group)

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Send every part's keys back to the rank that its images came from."""
        return distributed.exchange_rows(keys, self._group)


def _shared_permutation(size: int, device: torch.device) -> Tensor:
    permutation = torch.randperm(size, device=device)
    distributed.broadcast_([permutation])
    return permutation


class Gather:
    """The authors' shuffle: gather the images of all ranks, permute them, keep this rank's part.

    For comparison with their code; its traffic grows with the number of ranks. (moco/builder.py, _batch_shuffle_ddp)

    Args:
        draw: (size, device) -> a permutation of range(size), the same on every rank.
    """

    def __init__(self, draw: Callable[[int, torch.device], Tensor] = _shared_permutation):
        self._draw = draw
        self._permutation = torch.empty(0, dtype=torch.int64)

    @staticmethod
    def _own_part(rows: Tensor) -> Tensor:
        return rows.view(distributed.world_size(), -1, *rows.shape[1:])[distributed.rank()]

    def shuffle(self, images: Tensor) -> Tensor:
        """Return the images that a new permutation assigns to this rank."""
        gathered = distributed.all_gather_rows(images)
        self._permutation = self._draw(len(gathered), images.device)
        return gathered[self._own_part(self._permutation)]

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Undo the last permutation."""
        return distributed.all_gather_rows(keys)[self._own_part(self._permutation.argsort())]


class VirtualGroups:
    """Split one rank's batch into groups with their own batch statistics, as in the authors' CIFAR demo.

    A group is a run of neighboring samples in a batch. The key batch is interleaved, so that each of its groups holds
    the same share (to within one sample) of every group of queries. Both encoders need `use_group_statistics`.
    """

    def __init__(self, num_groups: int):
        self._num_groups = num_groups

    def shuffle(self, images: Tensor) -> Tensor:
        """Distribute the images over the groups in turn."""
        return images[self._dealt(len(images), images.device)]

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Restore the order of the queries."""
        return keys.view(-1, self._num_groups, *keys.shape[1:]).transpose(0, 1).reshape(keys.shape)

    def _dealt(self, size: int, device: torch.device) -> Tensor:
        return torch.arange(size, device=device).view(self._num_groups, -1).T.reshape(-1)


def exchange_group(local_world_size: int, *, smallest: int = 4) -> dist.ProcessGroup | None:
    """Return the group of ranks that exchange key images: one node if it has at least `smallest`, else None for all.

    Every rank must call this at the same point.

    Raises:
        ValueError: nodes have different numbers of ranks.
    """
    world_size = distributed.world_size()
    if local_world_size < smallest or local_world_size == world_size:
        return None
    if world_size % local_world_size:
        raise ValueError(
            f"{world_size} ranks do not divide into nodes of {local_world_size}, so nodes cannot exchange key images: "
            "start the same number of ranks on every node"
        )
    own_group, _ = dist.new_subgroups(group_size=local_world_size)
    assert isinstance(own_group, dist.ProcessGroup)
    return own_group


def build_policy(bn: BatchNormConfig, *, batch_size: int, local_world_size: int) -> KeyPolicy:
    """Build the configured policy and check it against the world; see also `convert_batch_norm`.

    Args:
        bn: the configuration; `auto` is `exchange` on several ranks and `virtual` on one.
        batch_size: samples per rank and batch.
        local_world_size: ranks on this node.

    Raises:
        ValueError: the policy cannot work in this world, or the batch is not divisible as it needs.
    """
    world_size = distributed.world_size()
    match resolve_policy(bn):
        case "none" | "sync":
            return Together()
        case "gather":
            return Gather()
        case "virtual":
            if world_size > 1:
                raise ValueError(
                    f"--bn.policy virtual splits the batch of a single rank, but there are {world_size}: use exchange"
                )
            _check_division(batch_size, bn.num_groups, world_size, f"{bn.num_groups} virtual groups")
            return VirtualGroups(bn.num_groups)
        case "exchange":
            if world_size == 1:
                raise ValueError("--bn.policy exchange needs several ranks, and there is one: use virtual")
            group = exchange_group(local_world_size)
            group_size = distributed.world_size(group)
            _check_division(batch_size, group_size, world_size, f"{group_size} ranks that exchange key images")
            return Exchange(group)


def resolve_policy(bn: BatchNormConfig) -> Literal["exchange", "virtual", "gather", "sync", "none"]:
    """Return `bn.policy`, with `auto` resolved."""
    if bn.policy != "auto":
        return bn.policy
    return "exchange" if distributed.world_size() > 1 else "virtual"


def _check_division(batch_size: int, parts: int, world_size: int, whose: str) -> None:
    # A single sample has no batch statistics.
    if batch_size % parts == 0 and batch_size >= 2 * parts:
        return
    below = max(2, batch_size // parts) * parts * world_size
    above = below + parts * world_size
    raise ValueError(
        f"a global batch of {batch_size * world_size} gives each rank {batch_size} samples, which {whose} cannot share "
        f"equally by two or more: use a multiple of {parts * world_size}, such as {below} or {above}"
    )
