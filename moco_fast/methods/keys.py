"""Sources of keys: the three mechanisms of MoCo v1, figure 2. All return unit vectors (B, D) in float32."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from moco_fast.encoders.encoder import unit_vectors
from moco_fast.methods.base import Autocast, Clock, Encode, Setting
from moco_fast.methods.clocked import ClockedPolicy
from moco_fast.methods.dictionary import Bank
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.recast import RecastWeights
from moco_fast.methods.shuffle import KeyPolicy

__all__ = ["BankKeys", "KeySource", "MomentumKeys", "QueryKeys"]


class KeySource(Protocol):
    """Source of a batch's keys."""

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Update the source; called once per optimizer step, before its first keys."""
        ...

    def __call__(self, encode: Encode, images: Tensor, index: Tensor, /) -> Tensor:
        """Return the keys (B, D) of images (B, 3, H, W) uint8, which are the samples `index` (B,)."""
        ...

    def on_a_clock(self, clock: Clock, /) -> "KeySource":
        """Return the same source with the parts of its forward pass timed by `clock`."""
        ...


@dataclass(frozen=True, eq=False)
class MomentumKeys:
    """Keys of the momentum encoder, without gradient (MoCo)."""

    key: nn.Module
    """The key encoder, from `copy_as_key_encoder`."""
    update: Callable[[float], None]
    """`MomentumUpdate` of the unwrapped query encoder and `key`."""
    policy: KeyPolicy
    """Decides among which samples keys are computed."""
    autocast: Autocast
    """Returns the context that sets the precision."""
    recast: RecastWeights | None = None
    """Weights of `key` in that precision, where it is lower than their own."""

    @classmethod
    def of(cls, setting: Setting) -> "MomentumKeys":
        """Copy the run's query encoder and compile the copy if the run compiles."""
        key = copy_as_key_encoder(setting.query)
        setting.compile(key)
        dtype = setting.lower_precision
        recast = None if dtype is None else RecastWeights(key, dtype)
        return cls(key, MomentumUpdate(setting.query, key), setting.policy, setting.autocast, recast)

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Move the key encoder toward the query encoder."""
        self.update(scheduled["momentum"])
        if self.recast is not None:
            self.recast.refresh()

    @torch.no_grad()
    def __call__(self, _encode: Encode, images: Tensor, _index: Tensor, /) -> Tensor:
        """Encode."""
        with nullcontext() if self.recast is None else self.recast.in_use():
            with self.autocast():
                shuffled = self.key(self.policy.shuffle(images))
            return self.policy.unshuffle(unit_vectors(shuffled))

    def on_a_clock(self, clock: Clock, /) -> "MomentumKeys":
        """Return the same with the policy on `clock`."""
        return replace(self, policy=ClockedPolicy(self.policy, clock))


@dataclass(frozen=True, eq=False)
class QueryKeys:
    """Keys of the query encoder itself, with gradients (end-to-end)."""

    policy: KeyPolicy
    """Among which samples keys are computed."""

    def advance(self, _scheduled: Mapping[str, float], /) -> None:
        """Do nothing: there is no key encoder to update."""

    def __call__(self, encode: Encode, images: Tensor, _index: Tensor, /) -> Tensor:
        """Encode."""
        shuffled = encode(self.policy.shuffle(images))
        return self.policy.unshuffle(unit_vectors(shuffled))

    def on_a_clock(self, clock: Clock, /) -> "QueryKeys":
        """Return the same with the policy on `clock`."""
        return replace(self, policy=ClockedPolicy(self.policy, clock))


@dataclass(frozen=True, eq=False)
class BankKeys:
    """Keys stored in the memory bank; no image is encoded for them."""

    bank: Bank

    def advance(self, _scheduled: Mapping[str, float], /) -> None:
        """Do nothing: the bank updates itself."""

    def __call__(self, _encode: Encode, _images: Tensor, index: Tensor, /) -> Tensor:
        """Look up the keys."""
        return self.bank.look_up(index)

    def on_a_clock(self, _clock: Clock, /) -> "BankKeys":
        """Return itself: there is no forward pass to time."""
        return self
