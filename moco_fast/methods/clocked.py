"""Wrappers that time the parts of an objective from outside."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moco_fast.methods.base import Clock, Encode

if TYPE_CHECKING:
    from moco_fast.methods.dictionary import Dictionary
    from moco_fast.methods.keys import KeySource
    from moco_fast.methods.shuffle import KeyPolicy

__all__ = ["ClockedDictionary", "ClockedKeys", "ClockedPolicy"]


@dataclass(frozen=True, eq=False)
class ClockedKeys:
    """Source of keys, timed as `momentum update` and `key forward`."""

    keys: "KeySource"
    clock: Clock

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Advance the key encoder."""
        with self.clock.part("momentum update"):
            self.keys.advance(scheduled)

    def __call__(self, encode: Encode, images: Tensor, index: Tensor, /) -> Tensor:
        """Compute the keys."""
        with self.clock.part("key forward"):
            return self.keys(encode, images, index)

    def on_a_clock(self, _clock: Clock, /) -> "ClockedKeys":
        """Return itself, which is already timed."""
        return self


@dataclass(frozen=True, eq=False)
class ClockedPolicy:
    """Shuffling policy, timed as `exchange`."""

    policy: "KeyPolicy"
    clock: Clock

    def shuffle(self, images: Tensor) -> Tensor:
        """Shuffle the key images."""
        with self.clock.part("exchange"):
            return self.policy.shuffle(images)

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Undo the shuffle."""
        with self.clock.part("exchange"):
            return self.policy.unshuffle(keys)


@dataclass(frozen=True, eq=False)
class ClockedDictionary:
    """Dictionary, timed as `loss` and `gather and enqueue`."""

    dictionary: "Dictionary"
    clock: Clock

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss."""
        with self.clock.part("loss"):
            return self.dictionary.contrast(queries, keys, temperature)

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Enqueue the keys."""
        with self.clock.part("gather and enqueue"):
            self.dictionary.take_in(queries, keys, index)
