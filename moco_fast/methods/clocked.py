"""Shells that put the parts of an objective on a clock: the same parts, timed from outside."""

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
    """A source of keys, as `momentum update` and `key forward`."""

    keys: "KeySource"
    clock: Clock

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Advance, timed."""
        with self.clock.part("momentum update"):
            self.keys.advance(scheduled)

    def __call__(self, encode: Encode, images: Tensor, index: Tensor, /) -> Tensor:
        """Make keys, timed."""
        with self.clock.part("key forward"):
            return self.keys(encode, images, index)

    def on_a_clock(self, _clock: Clock, /) -> "ClockedKeys":
        """Return itself: it is on one."""
        return self


@dataclass(frozen=True, eq=False)
class ClockedPolicy:
    """A policy, as `exchange`."""

    policy: "KeyPolicy"
    clock: Clock

    def shuffle(self, images: Tensor) -> Tensor:
        """Shuffle, timed."""
        with self.clock.part("exchange"):
            return self.policy.shuffle(images)

    def unshuffle(self, keys: Tensor) -> Tensor:
        """Undo it, timed."""
        with self.clock.part("exchange"):
            return self.policy.unshuffle(keys)


@dataclass(frozen=True, eq=False)
class ClockedDictionary:
    """A dictionary, as `loss` and `gather and enqueue`."""

    dictionary: "Dictionary"
    clock: Clock

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare, timed."""
        with self.clock.part("loss"):
            return self.dictionary.contrast(queries, keys, temperature)

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Take in, timed."""
        with self.clock.part("gather and enqueue"):
            self.dictionary.take_in(queries, keys, index)
