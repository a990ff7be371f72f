"""Where keys come from: three mechanisms of MoCo v1, figure 2. All give unit vectors (B, D) in float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moco_fast.encoders.encoder import unit_vectors
from moco_fast.methods.dictionary import MemoryBank
from moco_fast.methods.recast import RecastWeights
from moco_fast.methods.shuffle import KeyPolicy

__all__ = ["Autocast", "BankKeys", "KeySource", "MomentumKeys", "QueryKeys"]

Autocast = Callable[[], AbstractContextManager[object]]


class KeySource(Protocol):
    """Makes the keys of a batch."""

    def advance(self, momentum: float) -> None:
        """Once per optimizer step, before its first keys."""
        ...

    def __call__(self, images: Tensor, index: Tensor, /) -> Tensor:
        """Key images (B, 3, H, W) uint8 of samples `index` (B,) -> their keys (B, D)."""
        ...


def _encode(encoder: nn.Module, images: Tensor, policy: KeyPolicy, autocast: Autocast) -> Tensor:
    with autocast():
        shuffled = encoder(policy.shuffle(images))
    return policy.unshuffle(unit_vectors(shuffled))


@dataclass(frozen=True, eq=False)
class MomentumKeys:
    """Keys of a slow copy of the query encoder, without gradient (MoCo)."""

    key: nn.Module
    """The key encoder, from `copy_as_key_encoder`."""
    update: Callable[[float], None]
    """A `MomentumUpdate` of the bare query encoder and `key`."""
    policy: KeyPolicy
    """Among which samples keys are computed."""
    autocast: Autocast
    """Makes the context that chooses the precision."""
    recast: RecastWeights | None = None
    """Of `key`, where that precision is lower than the weights'."""

    def advance(self, momentum: float) -> None:
        """Move the key encoder toward the query encoder."""
        self.update(momentum)
        if self.recast is not None:
            self.recast.refresh()

    @torch.no_grad()
    def __call__(self, images: Tensor, _index: Tensor, /) -> Tensor:
        """Encode."""
        with nullcontext() if self.recast is None else self.recast.in_use():
            return _encode(self.key, images, self.policy, self.autocast)


@dataclass(frozen=True, eq=False)
class QueryKeys:
    """Keys of the query encoder itself, with gradients (end-to-end)."""

    query: nn.Module
    """The query encoder as it is called for queries."""
    policy: KeyPolicy
    """Among which samples keys are computed."""
    autocast: Autocast
    """Makes the context that chooses the precision."""

    def advance(self, momentum: float) -> None:
        """Nothing follows."""

    def __call__(self, images: Tensor, _index: Tensor, /) -> Tensor:
        """Encode."""
        return _encode(self.query, images, self.policy, self.autocast)


@dataclass(frozen=True, eq=False)
class BankKeys:
    """Keys that the memory bank remembers; no image is encoded for them."""

    bank: MemoryBank

    def advance(self, momentum: float) -> None:
        """The bank follows by itself."""

    def __call__(self, _images: Tensor, index: Tensor, /) -> Tensor:
        """Look up."""
        return self.bank.look_up(index)
