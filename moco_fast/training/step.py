"""Training step, the same for every method."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moco_fast.evaluation.online import OnlineProbe
from moco_fast.methods.base import Autocast, Objective
from pipelines.batch import Batch

__all__ = ["TrainStep"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainStep:
    """Training step built from parts that others own. Nothing in it waits for the device."""

    query: nn.Module
    """The query encoder, bare or wrapped in DistributedDataParallel or by accelerate."""
    objective: Objective
    """The method's losses and state."""
    optimizer: Optimizer
    """Optimizer of the query encoder's parameters."""
    clip_norm: float | None = None
    """Maximum norm of the gradient; None: no clipping."""
    autocast: Autocast = nullcontext
    """Returns the context that sets the query encoder's precision."""
    backward: Callable[[Tensor], object] = Tensor.backward
    """Backpropagates a loss (and scales it, if float16 needs that)."""
    unscale: Callable[[Optimizer], object] = lambda _: None
    """Divides gradients by the loss scale that `backward` applied."""
    probe: OnlineProbe | None = None
    """Learns from the features of each batch's first view, after its backward passes; None: there is none."""

    def __call__(self, batches: Sequence[Batch], *, lr: float, scheduled: Mapping[str, float]) -> dict[str, Tensor]:
        """Step once on the mean gradient of `batches`; the objective processes each batch separately.

        Args:
            batches: this rank's batches.
            lr: the learning rate.
            scheduled: the method's scheduled values for this step (`Method.scheduled`).

        Returns:
            Values to log, each () on the device, of this rank and averaged over batches: `loss`, the values that the
            method watches, and `grad_norm` of the gradient averaged over ranks.
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
        # Without arguments, since apex's method has none; all optimizers set gradients to None.
        self.optimizer.zero_grad()
        return _mean(watched) | {"grad_norm": grad_norm}

    def _accumulate(self, batch: Batch, weight: float, *, last: bool) -> dict[str, Tensor]:
        """Add `weight` times the gradient of one batch; gradients are averaged over ranks only with the last batch."""
        tap = None if self.probe is None else _Tap(batch.views[0])
        encode = _EncodeForStep(self.query, self.autocast, tap)
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
        of_batch = _mean(watched) | {"loss": torch.stack(losses).sum()}
        if self.probe is not None and tap is not None:
            assert tap.features is not None, "the first view was not encoded as it is"
            of_batch["probe/top1"] = self.probe.step(tap.features, batch.label)
        return of_batch

    def _averaging(self, wanted: bool) -> AbstractContextManager[object]:
        """Return a context whose backward pass averages gradients over ranks, or accumulates them on each rank."""
        if wanted or not isinstance(self.query, DistributedDataParallel):
            return nullcontext()
        return self.query.no_sync()

    def _clip_gradient(self) -> Tensor:
        """Scale the gradient down to the maximum norm; return its norm before clipping."""
        parameters = [parameter for parameter in self.query.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return norm


@dataclass
class _Tap:
    """Keeps the features of one of the views."""

    view: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class _EncodeForStep:
    query: nn.Module
    autocast: Autocast
    tap: _Tap | None = None

    def __call__(self, images: Tensor, /) -> Tensor:
        if self.tap is None:
            with self.autocast():
                return self.query(images)
        [queries] = self._tapped(images, self.tap)
        return queries

    def with_projection(self, images: Tensor, /) -> tuple[Tensor, Tensor]:
        if self.tap is None:
            with self.autocast():
                return self.query(images, with_projection=True)
        predicted, projected = self._tapped(images, self.tap, with_projection=True)
        return predicted, projected

    def _tapped(self, images: Tensor, tap: _Tap, **options: bool) -> tuple[Tensor, ...]:
        # All views, so that a compiled encoder has one graph.
        with self.autocast():
            *outputs, features = self.query(images, with_features=True, **options)
        if images is tap.view:
            tap.features = features
        return tuple(outputs)


def _mean(watched: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(watched) == 1:
        return dict(watched[0])
    return {name: torch.stack([each[name] for each in watched]).mean() for name in watched[0]}
