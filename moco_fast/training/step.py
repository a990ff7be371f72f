"""One optimizer step, whatever the method."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moco_fast.methods.base import Autocast, Objective
from pipelines.batch import Batch

__all__ = ["TrainStep"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainStep:
    """The training step, built from parts that others own. Nothing in it waits for the device."""

    query: nn.Module
    """The query encoder as it is called: itself, or wrapped in DistributedDataParallel or by accelerate."""
    objective: Objective
    """What the method computes, and what it remembers."""
    optimizer: Optimizer
    """Of the query encoder's parameters."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: any."""
    autocast: Autocast = nullcontext
    """Makes the context that chooses the query encoder's precision."""
    backward: Callable[[Tensor], object] = Tensor.backward
    """Backpropagates a loss (and scales it, if float16 needs that)."""
    unscale: Callable[[Optimizer], object] = lambda _: None
    """Divides gradients by what `backward` scaled them with."""

    def __call__(self, batches: Sequence[Batch], *, lr: float, scheduled: Mapping[str, float]) -> dict[str, Tensor]:
        """Step once on the mean gradient of `batches`; the objective takes in each by itself.

        Args:
            batches: of this rank.
            lr: the learning rate.
            scheduled: the method's numbers for this step (`Method.scheduled`).

        Returns:
            What to watch, each () on the device, this rank's own and the mean over batches: `loss`, what the method
            watches, and `grad_norm` of all ranks' mean gradient.
        """
        for group in self.optimizer.param_groups:
            if not group.get("constant_lr", False):
                group["lr"] = lr
        self.objective.advance(scheduled)
        last = len(batches) - 1
        watched = [
            self._accumulate(batch, 1 / len(batches), last=number == last) for number, batch in enumerate(batches)
        ]
        self.unscale(self.optimizer)
        grad_norm = self._clip_gradient()
        self.optimizer.step()
        # Without arguments, as apex's takes none; all set gradients to None.
        self.optimizer.zero_grad()
        return _mean(watched) | {"grad_norm": grad_norm}

    def _accumulate(self, batch: Batch, weight: float, *, last: bool) -> dict[str, Tensor]:
        """Add `weight` times the gradient of one batch; gradients are averaged over ranks in the last one only."""
        encode = _EncodeForStep(self.query, self.autocast)
        losses: list[Tensor] = []
        watched: list[Mapping[str, Tensor]] = []
        afterwards: list[Callable[[], object]] = []
        passes = self.objective.passes(encode, batch.views, batch.index)
        for number in range(self.objective.num_passes):
            with self._averaging(last and number + 1 == self.objective.num_passes):
                made = next(passes)
                self.backward(made.loss * weight)
            losses.append(made.loss.detach())
            watched.append(made.watched)
            afterwards.append(made.afterwards)
        for take_in in afterwards:
            take_in()
        return _mean(watched) | {"loss": torch.stack(losses).sum()}

    def _averaging(self, wanted: bool) -> AbstractContextManager[object]:
        """Let the backward pass average gradients over ranks, or let them pile up on each."""
        if wanted or not isinstance(self.query, DistributedDataParallel):
            return nullcontext()
        return self.query.no_sync()

    def _clip_gradient(self) -> Tensor:
        """Scale the gradient down to the largest norm allowed; return its norm before."""
        parameters = [parameter for parameter in self.query.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return norm


@dataclass(frozen=True)
class _EncodeForStep:
    query: nn.Module
    autocast: Autocast

    def __call__(self, images: Tensor, /) -> Tensor:
        with self.autocast():
            return self.query(images)

    def with_projection(self, images: Tensor, /) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return self.query(images, with_projection=True)


def _mean(watched: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(watched) == 1:
        return dict(watched[0])
    return {name: torch.stack([each[name] for each in watched]).mean() for name in watched[0]}
