"""Base classes of the contrastive methods: momentum contrast, memory bank, end-to-end. Does not import torch."""

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
    """Base of methods trained by InfoNCE, which classifies each query as its own key among all candidates."""

    dim: int = 128
    """Size of a query or key."""
    temperature: float = 0.2
    """Temperature of the softmax (the paper's tau)."""

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the values that `info_nce` returns, and the spread of the queries."""
        return ("accuracy", "similarity_positive", "similarity_negative", "feature_std")

    @property
    def loss_scale(self) -> float:
        """Factor that the loss is multiplied by."""
        return 1.0

    @abstractmethod
    def num_choices(self, batch_size: int, /) -> int:
        """Return the number of candidate keys per query, its own included, for a global batch of `batch_size`."""

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"temperature": self.temperature})

    def charts(self, batch_size: int, num_small: int = 0, /) -> tuple[Chart, ...]:
        """Return charts of the loss (with the level of guessing), the accuracy, both similarities and the spread."""
        num_choices = self.num_choices(batch_size)
        # The mean over small views has the weight of one large view.
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
        """Return how often a query's own key is the most similar one."""
        return f"own key first in {100 * line['accuracy']:.1f}% of the queries"

    def _about_loss(self) -> str:
        """Return an additional sentence about the loss, or an empty string."""
        return ""


@dataclass(frozen=True, kw_only=True)
class PlainHead(Contrastive):
    """Base of contrastive methods whose head has no batch norm."""

    head: Literal["linear", "mlp"] = "mlp"
    """Projection head: `linear` is one linear layer (v1), `mlp` is linear, ReLU, linear (v2)."""

    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projection head; there is no predictor."""
        del is_transformer
        from moco_fast.methods.heads import linear_head, mlp_head

        return (linear_head if self.head == "linear" else mlp_head)(feature_dim, self.dim), None
