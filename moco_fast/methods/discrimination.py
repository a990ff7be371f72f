"""Instance discrimination, the objective of all contrastive methods (MoCo v1 and v3, algorithm 1)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
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
    """Objective of every contrastive method, composed of a source of keys and a dictionary."""

    keys: KeySource
    dictionary: Dictionary
    """Dictionary on the device, the same on all ranks."""
    temperature: float
    loss_scale: float = 1.0
    """Factor of the loss (2 * temperature in MoCo v3)."""
    num_passes: int = 1
    """2: the views swap roles in the second backward pass. Both passes use the same dictionary."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Update the key encoder, if there is one."""
        self.keys.advance(scheduled)

    def passes(self, encode: Encode, views: tuple[Tensor, ...], index: Tensor, /) -> Iterator[Pass]:
        """Yield the loss of one view's queries against the other view's keys; a bank's keys need no view.

        Small views are queries in the last pass only, compared with the keys of all large views.
        """
        large, small = views[:2], views[2:]
        keys: list[Tensor] = []
        for number in range(self.num_passes):
            keys.append(self.keys(encode, large[1 - number if len(large) > 1 else 0], index))
            made = self._compare(encode, large[number], keys[-1], index)
            if small and number + 1 == self.num_passes:
                made = replace(made, loss=made.loss + self._loss_of_small(encode, small, keys))
            yield made

    def _compare(self, encode: Encode, images: Tensor, keys: Tensor, index: Tensor) -> Pass:
        queries = unit_vectors(encode(images))
        loss, watched = self.dictionary.contrast(queries, keys, self.temperature)
        taken_in = queries.detach(), keys.detach(), index
        return Pass(
            loss=loss * self.loss_scale,
            watched=watched | {"feature_std": feature_std(queries)},
            afterwards=partial(self.dictionary.take_in, *taken_in),
        )

    def _loss_of_small(self, encode: Encode, views: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """Return the mean loss of the small views, summed over the large views' keys.

        Not for a dictionary of the same batch's keys: each key would be its own negative.
        """
        queries = unit_vectors(encode(_interleaved(views)))  # (B * n, D)
        own_keys = [of_view.repeat_interleave(len(views), dim=0) for of_view in keys]  # (B * n, D) each
        losses = [self.dictionary.contrast(queries, own, self.temperature)[0] for own in own_keys]
        return torch.stack(losses).sum() * self.loss_scale

    def on_a_clock(self, clock: Clock, /) -> "Discrimination":
        """Time the parts momentum update, key forward, exchange, loss, gather and enqueue."""
        keys = ClockedKeys(self.keys.on_a_clock(clock), clock)
        return replace(self, keys=keys, dictionary=ClockedDictionary(self.dictionary, clock))


def _interleaved(views: Sequence[Tensor]) -> Tensor:
    """Interleave n views (B, 3, H, W) into one channels_last batch (B * n, 3, H, W), a sample's views side by side.

    A virtual group then holds the small views of the same samples as its large views.
    """
    rows = torch.stack([view.permute(0, 2, 3, 1) for view in views], dim=1)  # (B, n, H, W, 3)
    return rows.flatten(0, 1).permute(0, 3, 1, 2)
