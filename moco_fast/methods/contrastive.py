"""Contrastive methods: what momentum contrast, the memory bank and end-to-end have in common. Free of torch."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moco_fast.methods.base import Chart, Level, Method, refuse_unless_above_zero, spread_chart

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Contrastive", "PlainHead"]


@dataclass(frozen=True, kw_only=True)
class Contrastive(Method):
    """InfoNCE: a query is told apart from all keys but its own."""

    dim: int = 128
    """Size of a query or key."""
    temperature: float = 0.2
    """Temperature of the softmax (the paper's tau)."""

    @property
    def watched(self) -> tuple[str, ...]:
        """What `info_nce` watches, and how far the queries spread."""
        return ("accuracy", "similarity_positive", "similarity_negative", "feature_std")

    @property
    def loss_scale(self) -> float:
        """Factor of the loss."""
        return 1.0

    @abstractmethod
    def num_choices(self, batch_size: int, /) -> int:
        """Count the keys that a query is told apart from, its own included, in a global batch of so many samples."""

    def validate(self) -> None:
        """Refuse options that cannot work. Raises ValueError: with the option, its value and what would work."""
        super().validate()
        refuse_unless_above_zero({"temperature": self.temperature})

    def charts(self, batch_size: int, num_small: int = 0, /) -> tuple[Chart, ...]:
        """Show the loss beside that of one who guesses, the accuracy, both similarities and the spread."""
        num_choices = self.num_choices(batch_size)
        # The mean over small views is added with the weight of a large one.
        num_terms = self.backward_passes * (2 if num_small else 1)
        guessing = num_terms * self.loss_scale * math.log(num_choices)
        about_loss = [f"Finding the key of the same sample among {num_choices:,}.", self._about_loss()]
        if num_small:
            about_loss.append("The mean loss of the small views is added.")
        return (
            Chart(
                title="Loss",
                caption=" ".join(filter(None, about_loss)),
                curves={"loss": ""},
                level=Level(value=guessing, label="guessing"),
            ),
            Chart(
                title="Contrastive accuracy",
                caption="Share of queries that are more like their own key than like any other.",
                curves={"accuracy": ""},
                percent=True,
                from_zero=True,
            ),
            Chart(
                title="Similarities",
                caption="Mean cosine similarity of a query with its own key and with the others. Both at 1 would be "
                "collapse.",
                curves={"similarity_positive": "own key", "similarity_negative": "other keys"},
                about="health",
            ),
            spread_chart(self.dim, "queries"),
        )

    def note(self, line: Mapping[str, float], /) -> str:
        """Say how often the own key is the most similar."""
        return f"own key first in {100 * line['accuracy']:.1f}% of the queries"

    def _about_loss(self) -> str:
        """Return a sentence more about the loss, if there is one."""
        return ""


@dataclass(frozen=True, kw_only=True)
class PlainHead(Contrastive):
    """Contrastive methods whose queries and keys come out of a head without batch norm."""

    head: Literal["linear", "mlp"] = "mlp"
    """Projection on top of the encoder: one linear layer (v1), or linear, ReLU, linear (v2)."""

    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projection; there is no predictor."""
        del is_transformer
        from moco_fast.methods.heads import linear_head, mlp_head

        return (linear_head if self.head == "linear" else mlp_head)(feature_dim, self.dim), None
