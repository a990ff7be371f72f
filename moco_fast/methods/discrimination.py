"""Instance discrimination: each query's own key is told from those in a dictionary (MoCo v1, algorithm 1; v3's)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from moco_fast.encoders.encoder import unit_vectors
from moco_fast.methods.base import Clock, Encode, Pass
from moco_fast.methods.clocked import ClockedDictionary, ClockedKeys
from moco_fast.methods.dictionary import Dictionary
from moco_fast.methods.keys import KeySource
from moco_fast.methods.loss import feature_std

__all__ = ["Discrimination"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Discrimination:
    """The objective of every contrastive method, made of where keys come from and what they are told from."""

    keys: KeySource
    dictionary: Dictionary
    """On the device, and the same on all ranks."""
    temperature: float
    loss_scale: float = 1.0
    """Multiplies the loss (2 * temperature in MoCo v3)."""
    num_passes: int = 1
    """2: the views change roles in the second backward pass. Both meet the same dictionary."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Move the key encoder, if there is one."""
        self.keys.advance(scheduled)

    def loss(self, encode: Encode, views: tuple[Tensor, ...], index: Tensor, number: int, /) -> Pass:
        """Compare queries of one view with keys of the other; a bank's keys need no view."""
        keys = self.keys(encode, views[1 - number if len(views) > 1 else 0], index)
        queries = unit_vectors(encode(views[number]))
        loss, watched = self.dictionary.contrast(queries, keys, self.temperature)
        taken_in = queries.detach(), keys.detach(), index
        return Pass(
            loss=loss * self.loss_scale,
            watched=watched | {"feature_std": feature_std(queries)},
            afterwards=partial(self.dictionary.take_in, *taken_in),
        )

    def on_a_clock(self, clock: Clock, /) -> "Discrimination":
        """Parts: momentum update, key forward, exchange, loss, gather and enqueue."""
        keys = ClockedKeys(self.keys.on_a_clock(clock), clock)
        return replace(self, keys=keys, dictionary=ClockedDictionary(self.dictionary, clock))
