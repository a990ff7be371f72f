"""The dictionary as a queue: the newest keys of past batches (MoCo v1, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast.distributed import all_gather_rows
from moco_fast.methods.loss import info_nce

__all__ = ["Queue"]


class Queue(nn.Module):
    """The newest `size` keys of all ranks, first in, first out; starts with random unit vectors.

    State dict: `keys` (size, dim) float32, one key a row; `position` () int64, the row that is overwritten next.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, dim: int, size: int, generator: torch.Generator):
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} keys leaves no negatives to tell a query from: use at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator)))
        # On the device with the keys: enqueueing then neither waits for the device nor depends on the host.
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell each query's own key from those in the queue: see `info_nce`."""
        return info_nce(queries, keys, self.keys, temperature)

    @torch.no_grad()
    def take_in(self, _queries: Tensor, keys: Tensor, _index: Tensor, /) -> None:
        """Enqueue the keys (B, D) of every rank."""
        self.enqueue(all_gather_rows(keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys by `keys` (B, dim), which must be the same on all ranks; any B, wrapping as needed.

        The authors' code requires the queue's size to be a multiple of B.
        """
        size = len(self.keys)
        newest = keys[-size:]
        rows = torch.arange(len(keys) - len(newest), len(keys), device=self.position.device)
        self.keys.index_copy_(0, (rows + self.position) % size, newest.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)
