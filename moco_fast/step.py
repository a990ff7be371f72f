"""One optimizer step of momentum contrast (MoCo v1, algorithm 1)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moco_fast.batchnorm import KeyPolicy
from moco_fast.distributed import all_gather_rows
from moco_fast.encoders import normalize_images
from moco_fast.loss import feature_std, info_nce
from moco_fast.momentum import MomentumUpdate
from moco_fast.queue import Queue
from pipelines.batch import TwoViewBatch

__all__ = ["TrainStep"]


class TrainStep:
    """The training step, built from parts that others own. Nothing in it waits for the device.

    Args:
        query: the query encoder as it is called: itself, or wrapped in DistributedDataParallel or by accelerate.
        key: the key encoder, from `copy_as_key_encoder`, on the same device.
        momentum_update: of the bare query encoder and `key`.
        queue: on the same device, and the same on all ranks.
        policy: where keys are computed.
        optimizer: of the query encoder's parameters.
        temperature: of the loss.
        autocast: makes the context that chooses the encoders' precision.
        backward: backpropagates a loss (and scales it, if float16 needs that).
        unscale: divides gradients by what `backward` scaled them with.
    """

    def __init__(
        self,
        *,
        query: nn.Module,
        key: nn.Module,
        momentum_update: MomentumUpdate,
        queue: Queue,
        policy: KeyPolicy,
        optimizer: Optimizer,
        temperature: float,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        backward: Callable[[Tensor], object] = Tensor.backward,
        unscale: Callable[[Optimizer], object] = lambda _: None,
    ):
        self._query, self._key = query, key
        self._momentum_update = momentum_update
        self._queue = queue
        self._policy = policy
        self._optimizer = optimizer
        self._temperature = temperature
        self._autocast, self._backward, self._unscale = autocast, backward, unscale

    def __call__(self, batches: Sequence[TwoViewBatch], *, lr: float, momentum: float) -> dict[str, Tensor]:
        """Step once on the mean gradient of `batches`; the dictionary takes in the keys of each.

        Returns:
            What to watch, each () on the device, this rank's own and the mean over batches: `loss`, `accuracy`,
            `similarity_positive`, `similarity_negative`, `feature_std`, and `grad_norm` of all ranks' mean gradient.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._momentum_update(momentum)
        watched = [self._accumulate(batch, 1 / len(batches), batch is batches[-1]) for batch in batches]
        self._unscale(self._optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self._query.parameters() if p.grad is not None])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        means = {name: torch.stack([each[name] for each in watched]).mean() for name in watched[0]}
        return means | {"grad_norm": grad_norm}

    def _accumulate(self, batch: TwoViewBatch, weight: float, last: bool) -> dict[str, Tensor]:
        """Add `weight` times the gradient of one batch; gradients are averaged over ranks in the last one only."""
        with torch.no_grad(), self._autocast():
            shuffled = self._key(normalize_images(self._policy.shuffle(batch.view_k)))
            keys = self._policy.unshuffle(F.normalize(shuffled.float()))
            # Gathered here, so that no collective of ours meets the gradients' in the backward pass.
            keys_of_all_ranks = all_gather_rows(keys)
        with self._gradients_averaged(last):
            with self._autocast():
                queries = self._query(normalize_images(batch.view_q))
            # In float32: in half precision, the length of a short vector would round to zero.
            queries = F.normalize(queries.float())
            loss, watched = info_nce(queries, keys, self._queue.keys, self._temperature)
            self._backward(loss * weight)
        self._queue.enqueue(keys_of_all_ranks)
        return watched | {"loss": loss.detach(), "feature_std": feature_std(queries)}

    def _gradients_averaged(self, last: bool) -> AbstractContextManager[object]:
        if last or not isinstance(self._query, DistributedDataParallel):
            return nullcontext()
        return self._query.no_sync()
