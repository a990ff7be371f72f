"""Linear classifier that is trained beside a run, on detached features of its training views.

As solo-learn publishes it (solo/methods/base.py: cross-entropy on features without gradient), but with an optimizer of
its own, so that nothing of the run depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast import distributed
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Split, Task, Want

__all__ = ["HeldOutProbe", "OnlineProbe"]

_ROWS = 8192  # features that are classified at once


class OnlineProbe(nn.Module):
    """A linear classifier of C classes on features of D numbers, the same on every rank, and its optimizer.

    Args:
        dim: D.
        num_classes: C.
        lr: of AdamW without weight decay, whose step does not depend on the scale of features.
        seed: of the first weights, drawn from N(0, 0.01) by a generator of their own; biases are 0.
        device: where features are.
    """

    def __init__(self, dim: int, num_classes: int, *, lr: float, seed: int, device: torch.device):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(num_classes, dim, generator=generator)
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C) scores."""
        return F.linear(features, self.weight, self.bias)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Take one step on the labeled samples of all ranks; collective.

        Args:
            features: (B, D), of this rank.
            labels: (B,) int64, -1 where there is none.

        Returns:
            () share of this rank's labeled samples that the classifier named before the step; not a number without any.
        """
        num_classes, dim = self.weight.shape
        labels = labels.to(features.device, non_blocking=True)
        features = features.float()
        has_label = labels >= 0
        scores = self(features)
        # The gradient of cross-entropy, written out: the softmax less the label. All of it travels as one buffer.
        error = scores.softmax(dim=1)
        error.scatter_add_(1, labels.clamp(min=0)[:, None], torch.full_like(error[:, :1], -1))
        error *= has_label[:, None]
        total = features.new_empty(num_classes * (dim + 1) + 1)
        of_weight, of_bias, count = total.split([num_classes * dim, num_classes, 1])
        torch.mm(error.T, features, out=of_weight.view(num_classes, dim))
        torch.sum(error, dim=0, out=of_bias)
        count.copy_(has_label.sum())
        if distributed.world_size() > 1:
            dist.all_reduce(total)
        total /= count.clamp(min=1)
        self.weight.grad, self.bias.grad = of_weight.view(num_classes, dim), of_bias
        self.optimizer.step()
        self.optimizer.zero_grad()
        right = (scores.argmax(dim=1) == labels) & has_label
        return right.sum() / has_label.sum()


@dataclass(frozen=True, kw_only=True)
class HeldOutProbe(Task):
    """Test the classifier that a run trains beside itself on held-out samples."""

    name: ClassVar[str] = "probe"
    classifies: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    probe: OnlineProbe | None = None

    @property
    def splits(self) -> frozenset[Split]:
        """Both: the classifier has learned from training samples."""
        return frozenset({"train", "test"})

    def wants(self) -> tuple[Want, ...]:
        """The held-out samples."""
        return (Want(split="test"),)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracy."""
        caption = "Share of held-out samples that the classifier names which is trained beside the run, as it is then."
        return {"held_out_top1": FigureInfo(title="online probe top-1", caption=caption)}

    def measure(self, inputs: Inputs) -> Outcome:
        """Classify."""
        assert self.probe is not None
        features = inputs.features(*self.wants())
        with torch.no_grad():
            parts = [self.probe(part.to(inputs.device)).argmax(dim=1).cpu() for part in features.values.split(_ROWS)]
        top1 = (torch.cat(parts) == features.labels).double().mean().item()
        return Outcome(figures={"held_out_top1": Measured(value=top1, num_trials=len(features))})
