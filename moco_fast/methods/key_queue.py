"""Queue of keys, the dictionary of MoCo v1, section 3.2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast.distributed import all_gather_rows
from moco_fast.methods.loss import info_nce

__all__ = ["Queue"]


class Queue(nn.Module):
    """The newest `size` keys of all ranks, first in, first out; starts with random unit vectors.

    State dict: `keys` (size, dim) float32, one key per row; `position` () int64, the row to overwrite next.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, dim: int, size: int, generator: torch.Generator):
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} keys holds no negatives to compare a query with: use at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator)))
        # On the device with the keys, so that enqueueing neither waits for the device nor depends on the host.
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare each query with its own key and those in the queue: see `info_nce`."""
        return info_nce(queries, keys, self.keys, temperature)

    @torch.no_grad()
    def take_in(self, _queries: Tensor, keys: Tensor, _index: Tensor, /) -> None:
        """Enqueue the keys (B, D) of every rank."""
        self.enqueue(all_gather_rows(keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys with `keys` (B, dim), which must be the same on all ranks.

        B may have any value, and the position wraps around; the authors' code needs the size to be a multiple of B.
        """
        size = len(self.keys)
        newest = keys[-size:]
        rows = torch.arange(len(keys) - len(newest), len(keys), device=self.position.device)
        self.keys.index_copy_(0, (rows + self.position) % size, newest.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)
