"""One optimizer step of momentum contrast (MoCo v1, algorithm 1; MoCo v3, algorithm 1)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moco_fast.encoders.encoder import unit_vectors
from moco_fast.methods.dictionary import Dictionary
from moco_fast.methods.keys import KeySource
from moco_fast.methods.loss import feature_std
from pipelines.batch import Batch

__all__ = ["TrainStep"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainStep:
    """The training step, built from parts that others own. Nothing in it waits for the device."""

    query: nn.Module
    """The query encoder as it is called: itself, or wrapped in DistributedDataParallel or by accelerate."""
    keys: KeySource
    """Where keys come from."""
    dictionary: Dictionary
    """What queries are told apart from; on the same device, and the same on all ranks."""
    optimizer: Optimizer
    """Of the query encoder's parameters."""
    temperature: float
    """Of the loss."""
    symmetric: bool = False
    """Add the loss with the views' roles exchanged."""
    loss_scale: float = 1.0
    """Multiplies the loss (2 * temperature in MoCo v3)."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: any."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes the context that chooses the encoders' precision."""
    backward: Callable[[Tensor], object] = Tensor.backward
    """Backpropagates a loss (and scales it, if float16 needs that)."""
    unscale: Callable[[Optimizer], object] = lambda _: None
    """Divides gradients by what `backward` scaled them with."""

    def __call__(self, batches: Sequence[Batch], *, lr: float, momentum: float) -> dict[str, Tensor]:
        """Step once on the mean gradient of `batches`; the dictionary takes in the keys of each.

        Returns:
            What to watch, each () on the device, this rank's own and the mean over batches: `loss`, `accuracy`,
            `similarity_positive`, `similarity_negative`, `feature_std`, and `grad_norm` of all ranks' mean gradient.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.keys.advance(momentum)
        watched = [self._accumulate(batch, 1 / len(batches), last=batch is batches[-1]) for batch in batches]
        self.unscale(self.optimizer)
        grad_norm = self._clip_gradient()
        self.optimizer.step()
        # Without arguments, as apex's takes none; all set gradients to None.
        self.optimizer.zero_grad()
        return _mean(watched) | {"grad_norm": grad_norm}

    def _accumulate(self, batch: Batch, weight: float, *, last: bool) -> dict[str, Tensor]:
        """Add `weight` times the gradient of one batch; gradients are averaged over ranks in the last one only."""
        first, second = batch.views
        directions = [(first, second), (second, first)][: 1 + self.symmetric]
        outcomes = []
        for number, (view_q, view_k) in enumerate(directions, start=1):
            with self._averaging(last and number == len(directions)):
                keys = self.keys(view_k, batch.index)
                with self.autocast():
                    queries = self.query(view_q)
                queries = unit_vectors(queries)
                loss, watched = self.dictionary.contrast(queries, keys, self.temperature)
                loss = loss * self.loss_scale
                self.backward(loss * weight)
            outcomes.append((queries.detach(), keys.detach(), watched, loss.detach()))
        # Both directions are told apart from the same dictionary.
        for queries, keys, _, _ in outcomes:
            self.dictionary.take_in(queries, keys, batch.index)
        watched = _mean([watched | {"feature_std": feature_std(queries)} for queries, _, watched, _ in outcomes])
        return watched | {"loss": torch.stack([loss for *_, loss in outcomes]).sum()}

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


def _mean(watched: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(watched) == 1:
        return watched[0]
    return {name: torch.stack([each[name] for each in watched]).mean() for name in watched[0]}
