"""Momentum contrast: MoCo v1 and v2 with a queue (arXiv:1911.05722, 2003.04297), v3 without one (2104.02057)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from moco_fast.methods.base import (
    Objective,
    Setting,
    momentum_at,
    refuse_unless_above_zero,
    refuse_unless_average,
)
from moco_fast.methods.contrastive import Contrastive, PlainHead

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MomentumContrast", "MomentumContrastV3"]


@dataclass(frozen=True, kw_only=True)
class MomentumContrast(PlainHead):
    """Keys of a momentum encoder, with a queue of past batches' keys as negatives."""

    name: ClassVar[str] = "momentum-contrast"
    takes_small_views: ClassVar[bool] = True
    queue_size: int = field(default=65536, metadata={"metavar": "KEYS"})
    """Number of keys of past batches in the queue, the negatives of a query (the paper's K)."""
    momentum: float = 0.999
    """Momentum of the key encoder (the paper's m)."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine`: m rises to 1 over the run (MoCo v3)."""
    symmetric: bool = False
    """Use each view once as query and once as key, and add the two losses."""

    @property
    def backward_passes(self) -> int:
        """Return 1, or 2 for both directions."""
        return 1 + self.symmetric

    @property
    def dictionary_size(self) -> int | None:
        """Return the size of the queue."""
        return self.queue_size

    def queue_age(self, batch_size: int, /) -> float | None:
        """Return the steps until the queue is filled again; each direction of a symmetric loss enqueues its keys."""
        return self.queue_size / (batch_size * self.backward_passes)

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Return a query and a key for each direction."""
        return self.backward_passes, self.backward_passes

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"queue_size": self.queue_size})
        refuse_unless_average("momentum", self.momentum)

    def num_choices(self, batch_size: int, /) -> int:
        """Return the number of keys in the queue plus the query's own."""
        del batch_size
        return self.queue_size + 1

    def scheduled(self, step: int, num_steps: int, /) -> dict[str, float]:
        """Return m."""
        return {"momentum": momentum_at(step, num_steps, self.momentum, self.momentum_schedule)}

    def build(self, setting: Setting, /) -> Objective:
        """Build the key encoder and the queue."""
        import torch

        from moco_fast.methods.discrimination import Discrimination
        from moco_fast.methods.key_queue import Queue
        from moco_fast.methods.keys import MomentumKeys

        keys = MomentumKeys.of(setting)
        queue = Queue(self.dim, self.queue_size, torch.Generator().manual_seed(setting.seed)).to(setting.device)
        return Discrimination(
            keys=keys,
            dictionary=queue,
            temperature=self.temperature,
            num_passes=self.backward_passes,
            modules={"key": keys.key, "queue": queue},
        )

    def _about_loss(self) -> str:
        return "It rises at first, while the queue fills with keys that are harder to tell apart."


@dataclass(frozen=True, kw_only=True)
class MomentumContrastV3(Contrastive):
    """Keys of a momentum encoder, with the same batch's keys as negatives and a predictor for queries."""

    name: ClassVar[str] = "momentum-contrast-v3"
    dim: int = 256
    """Size of a query or key."""
    mlp_dim: int = 4096
    """Width of the projector's and the predictor's hidden layers."""
    temperature: float = 1.0
    """Temperature of the softmax (the paper's tau)."""
    momentum: float = 0.99
    """Momentum of the key encoder (the paper's m)."""
    momentum_schedule: Literal["constant", "cosine"] = "cosine"
    """`cosine`: m rises to 1 over the run."""

    @property
    def backward_passes(self) -> int:
        """Return 2, one per direction: each view is once query and once key."""
        return 2

    @property
    def loss_scale(self) -> float:
        """Return 2 * temperature (algorithm 1)."""
        return 2 * self.temperature

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Return a query and a key for each direction."""
        return self.backward_passes, self.backward_passes

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"mlp_dim": self.mlp_dim})
        refuse_unless_average("momentum", self.momentum)

    def num_choices(self, batch_size: int, /) -> int:
        """Return the number of keys in the batch."""
        return batch_size

    def scheduled(self, step: int, num_steps: int, /) -> dict[str, float]:
        """Return m."""
        return {"momentum": momentum_at(step, num_steps, self.momentum, self.momentum_schedule)}

    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projector and the predictor.

        A ResNet has a two-layer projector and no batch norm after the predictor; a transformer has a three-layer
        projector and that batch norm (moco/builder.py of facebookresearch/moco-v3).
        """
        from moco_fast.methods.heads import mlp_with_batch_norm

        hidden = [self.mlp_dim] * (2 if is_transformer else 1)
        projector = mlp_with_batch_norm([feature_dim, *hidden, self.dim], last_norm=True)
        predictor = mlp_with_batch_norm([self.dim, self.mlp_dim, self.dim], last_norm=is_transformer)
        return projector, predictor

    def build(self, setting: Setting, /) -> Objective:
        """Build the key encoder."""
        from moco_fast.methods.dictionary import InBatch
        from moco_fast.methods.discrimination import Discrimination
        from moco_fast.methods.keys import MomentumKeys

        keys = MomentumKeys.of(setting)
        return Discrimination(
            keys=keys,
            dictionary=InBatch(),
            temperature=self.temperature,
            loss_scale=self.loss_scale,
            num_passes=self.backward_passes,
            modules={"key": keys.key},
        )
