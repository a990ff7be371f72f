"""Dictionaries of candidate keys (MoCo v1, figure 2). The queue is in its own file."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast import distributed
from moco_fast.methods.loss import info_nce, info_nce_in_batch

__all__ = ["Bank", "Dictionary", "InBatch"]


class Dictionary(Protocol):
    """Candidate keys that a query is compared with; a module whose state dict is part of the checkpoint."""

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this rank's queries (B, D) and keys (B, D), both unit vectors; see `info_nce`."""
        ...

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Store this rank's queries (B, D) or keys (B, D) of the samples `index` (B,), identically on all ranks."""
        ...


class InBatch(nn.Module):
    """Keys of the current batch on all ranks, with gradients if they have any; nothing is stored."""

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare each query with the keys of the whole batch: see `info_nce_in_batch`."""
        first = distributed.rank() * len(keys)
        return info_nce_in_batch(queries, distributed.all_gather_rows(keys), first, temperature)

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Do nothing: no keys are stored."""


class Bank(nn.Module):
    """Memory bank: one key per sample of the set, a moving average of the sample's queries (Wu et al. 2018).

    State dict: `keys` (num_samples, dim) float32, by dense sample number; random unit vectors at the start. All queries
    of a batch share `num_negatives` negatives, drawn with replacement. Drawing them per query, as InstDisc does, would
    gather 32 MiB per query for 65,536 keys of 128 numbers. The expected loss and gradient are the same.
    """

    keys: Tensor

    def __init__(self, dim: int, num_samples: int, generator: torch.Generator, *, num_negatives: int, momentum: float):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(num_samples, dim, generator=generator)))
        self._num_negatives = num_negatives
        self._momentum = momentum

    def look_up(self, index: Tensor) -> Tensor:
        """Return the keys (B, dim) of samples `index` (B,)."""
        return self.keys[index.to(self.keys.device, non_blocking=True)]

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare each query with its own key and others of the bank: see `info_nce`."""
        drawn = torch.randint(len(self.keys), (self._num_negatives,), device=self.keys.device)
        return info_nce(queries, keys, self.keys[drawn], temperature)

    @torch.no_grad()
    def take_in(self, queries: Tensor, _keys: Tensor, index: Tensor, /) -> None:
        """Move the samples' keys toward their queries and normalize them to unit length."""
        index = distributed.all_gather_rows(index.to(self.keys.device, non_blocking=True))
        queries = distributed.all_gather_rows(queries)
        self.keys[index] = F.normalize(torch.lerp(queries.to(self.keys.dtype), self.keys[index], self._momentum))
