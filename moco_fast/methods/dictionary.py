"""Dictionaries: what a query is told apart from (MoCo v1, figure 2). The queue has its own file."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast import distributed
from moco_fast.methods.loss import info_nce, info_nce_in_batch

__all__ = ["Bank", "Dictionary", "InBatch"]


class Dictionary(Protocol):
    """Holds the candidates that a query's own key is told from; a module, whose state dict a checkpoint keeps."""

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this rank's queries (B, D) and keys (B, D), both unit vectors; see `info_nce`."""
        ...

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Learn this rank's queries (B, D) and keys (B, D) of the samples `index` (B,), equally on all ranks."""
        ...


class InBatch(nn.Module):
    """The keys of the same batch on all ranks, with gradients if they have any; nothing is kept."""

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell each query's own key from those of the whole batch: see `info_nce_in_batch`."""
        first = distributed.rank() * len(keys)
        return info_nce_in_batch(queries, distributed.all_gather_rows(keys), first, temperature)

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor, /) -> None:
        """Nothing to learn."""


class Bank(nn.Module):
    """A key for every sample of the set, which follows the sample's queries by a momentum of its own (Wu et al. 2018).

    State dict: `keys` (num_samples, dim) float32, by dense sample number; random unit vectors at the start. Each batch
    is told apart from `num_negatives` of them, drawn with replacement and shared by its queries: drawn for each query,
    as InstDisc does, 65,536 keys of 128 numbers would be 32 MiB to gather per query. Loss and gradient are the same in
    the mean.
    """

    keys: Tensor

    def __init__(self, dim: int, num_samples: int, generator: torch.Generator, *, num_negatives: int, momentum: float):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(num_samples, dim, generator=generator)))
        self._num_negatives = num_negatives
        self._momentum = momentum

    def look_up(self, index: Tensor) -> Tensor:
        """The keys (B, dim) of samples `index` (B,)."""
        return self.keys[index.to(self.keys.device, non_blocking=True)]

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell each query's own key from others of the bank: see `info_nce`."""
        drawn = torch.randint(len(self.keys), (self._num_negatives,), device=self.keys.device)
        return info_nce(queries, keys, self.keys[drawn], temperature)

    @torch.no_grad()
    def take_in(self, queries: Tensor, _keys: Tensor, index: Tensor, /) -> None:
        """Move the samples' keys toward their queries, and back to unit length."""
        index = distributed.all_gather_rows(index.to(self.keys.device, non_blocking=True))
        queries = distributed.all_gather_rows(queries)
        self.keys[index] = F.normalize(torch.lerp(queries.to(self.keys.dtype), self.keys[index], self._momentum))
