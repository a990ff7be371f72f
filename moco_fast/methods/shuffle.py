"""Shuffling BN: among which samples keys are computed (MoCo v1, section 3.3).

Within a batch, a query and its key would share batch-norm statistics, and the encoders learn to recognize those instead
of the image. So keys are computed among other samples than their queries. A policy holds the two halves of that:
`shuffle` rearranges the key images before the key encoder, `unshuffle` brings the keys back beside their queries.
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
    """Where keys are computed. Both methods keep shape and dtype; neither carries gradients."""

    def shuffle(self, images: Tensor) -> Tensor:
        """This rank's key images (B, 3, H, W) -> those that its key encoder sees."""
        ...

    def unshuffle(self, keys: Tensor) -> Tensor:
        """What the key encoder made of them (B, D) -> the keys of this rank's own images, in their order."""
        ...


class Together:
    """Keys are computed on their queries' batch: right if there is no batch norm, or a synchronized one."""

    def shuffle(self, images: Tensor) -> Tensor:
        """The images as they are."""
        return images

    def unshuffle(self, keys: Tensor) -> Tensor:
        """The keys as they are."""
        return keys


class Exchange:
    """Each rank gives an equal part of its key images to every rank of the group, and gets their keys back.

    A rank then computes keys on 1 / W of its own images, the share that the paper's permutation has on average; the
    loader permutes every rank's batch each step, so that these are other samples each time.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group

    def shuffle(self, images: Tensor) -> Tensor:
        """Part j of this rank's images goes to rank j."""
        return distributed.exchange_rows(images, self._group)

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Every part's keys go back to the rank that they came from."""
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
        """The images that a fresh permutation gives to this rank."""
        gathered = distributed.all_gather_rows(images)
        self._permutation = self._draw(len(gathered), images.device)
        return gathered[self._own_part(self._permutation)]

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Undo the latest permutation."""
        return distributed.all_gather_rows(keys)[self._own_part(self._permutation.argsort())]


class VirtualGroups:
    """Several groups with batch statistics of their own on one rank, as in the authors' CIFAR demo.

    Groups are runs of neighboring samples in a batch. The key batch is interleaved, so that each of its groups holds
    the same share (to within one sample) of every group of queries. Both encoders need `use_group_statistics`.
    """

    def __init__(self, num_groups: int):
        self._num_groups = num_groups

    def shuffle(self, images: Tensor) -> Tensor:
        """Deal the groups' images out in turn."""
        return images[self._dealt(len(images), images.device)]

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Put the keys back into their queries' order."""
        return keys.view(-1, self._num_groups, *keys.shape[1:]).transpose(0, 1).reshape(keys.shape)

    def _dealt(self, size: int, device: torch.device) -> Tensor:
        return torch.arange(size, device=device).view(self._num_groups, -1).T.reshape(-1)


def exchange_group(local_world_size: int, *, smallest: int = 4) -> dist.ProcessGroup | None:
    """The ranks that exchange key images: those of one node if there are at least `smallest`, else (None) all.

    Every rank must call this, at the same point.

    Raises:
        ValueError: nodes with different numbers of ranks.
    """
    world_size = distributed.world_size()
    if local_world_size < smallest or local_world_size == world_size:
        return None
    if world_size % local_world_size:
        raise ValueError(
            f"{world_size} ranks do not divide into nodes of {local_world_size}, so nodes cannot exchange key images: "
            "start equally many ranks on every node"
        )
    own_group, _ = dist.new_subgroups(group_size=local_world_size)
    assert isinstance(own_group, dist.ProcessGroup)
    return own_group


def build_policy(bn: BatchNormConfig, *, batch_size: int, local_world_size: int) -> KeyPolicy:
    """The policy that the configuration names, checked against the world; see also `convert_batch_norm`.

    Args:
        bn: the configuration; `auto` is `exchange` on several ranks and `virtual` on one.
        batch_size: samples of one rank in one batch.
        local_world_size: ranks on this node.

    Raises:
        ValueError: a policy that cannot work in this world, or a batch that does not divide as it must.
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
    """`bn.policy`, with `auto` decided."""
    if bn.policy != "auto":
        return bn.policy
    return "exchange" if distributed.world_size() > 1 else "virtual"


def _check_division(batch_size: int, parts: int, world_size: int, whose: str) -> None:
    # A part of one sample has no batch statistics.
    if batch_size % parts == 0 and batch_size >= 2 * parts:
        return
    below = max(2, batch_size // parts) * parts * world_size
    above = below + parts * world_size
    raise ValueError(
        f"a global batch of {batch_size * world_size} gives each rank {batch_size} samples, which {whose} cannot share "
        f"equally by two or more: use a multiple of {parts * world_size}, such as {below} or {above}"
    )
