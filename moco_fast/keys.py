"""Where keys come from: three mechanisms of MoCo v1, figure 2. All give unit vectors (B, D) in float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from moco_fast.batchnorm import KeyPolicy
from moco_fast.dictionary import MemoryBank
from moco_fast.encoders import normalize_images, unit_vectors
from moco_fast.momentum import MomentumUpdate

__all__ = ["BankKeys", "KeySource", "MomentumKeys", "QueryKeys"]

Autocast = Callable[[], AbstractContextManager[object]]


class KeySource(Protocol):
    """Makes the keys of a batch."""

    def advance(self, momentum: float) -> None:
        """Once per optimizer step, before its first keys."""
        ...

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        """Key images (B, 3, H, W) uint8 of samples `index` (B,) -> their keys (B, D)."""
        ...


def _encode(encoder: nn.Module, images: Tensor, policy: KeyPolicy, autocast: Autocast) -> Tensor:
    with autocast():
        shuffled = encoder(normalize_images(policy.shuffle(images)))
    return policy.unshuffle(unit_vectors(shuffled))


class MomentumKeys:
    """Keys of a slow copy of the query encoder, without gradient (MoCo).

    Args:
        key: the key encoder, from `copy_as_key_encoder`.
        update: of the bare query encoder and `key`.
        policy: among which samples keys are computed.
        autocast: makes the context that chooses the precision.
    """

    def __init__(self, key: nn.Module, update: MomentumUpdate, policy: KeyPolicy, autocast: Autocast):
        self._key, self._update, self._policy, self._autocast = key, update, policy, autocast

    def advance(self, momentum: float) -> None:
        """Move the key encoder towards the query encoder."""
        self._update(momentum)

    @torch.no_grad()
    def __call__(self, images: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        """Encode."""
        return _encode(self._key, images, self._policy, self._autocast)


class QueryKeys:
    """Keys of the query encoder itself, with gradients (end-to-end).

    Args:
        query: the query encoder as it is called for queries.
        policy: among which samples keys are computed.
        autocast: makes the context that chooses the precision.
    """

    def __init__(self, query: nn.Module, policy: KeyPolicy, autocast: Autocast):
        self._query, self._policy, self._autocast = query, policy, autocast

    def advance(self, momentum: float) -> None:
        """Nothing follows."""

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        """Encode."""
        return _encode(self._query, images, self._policy, self._autocast)


class BankKeys:
    """Keys that the memory bank remembers; no image is encoded for them."""

    def __init__(self, bank: MemoryBank):
        self._bank = bank

    def advance(self, momentum: float) -> None:
        """The bank follows by itself."""

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        """Look up."""
        return self._bank.look_up(index)
