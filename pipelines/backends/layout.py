"""Layout of a batch's views in one block of memory: view after view, each of its own size."""

from collections.abc import Sequence
from itertools import accumulate

from shards.ground.arrays import Pixels

__all__ = ["num_view_bytes", "split_views", "view_begins"]


def view_begins(sizes: Sequence[int], capacity: int) -> list[int]:
    """Return the first byte of each view of `capacity` samples, and behind them the number of bytes of all."""
    return list(accumulate((capacity * size * size * 3 for size in sizes), initial=0))


def num_view_bytes(sizes: Sequence[int], capacity: int) -> int:
    """Return the bytes of all views of so many samples."""
    return view_begins(sizes, capacity)[-1]


def split_views(memory: Pixels, sizes: Sequence[int], capacity: int) -> list[Pixels]:
    """Return the views in a block of memory: (capacity, S, S, 3) each, for sizes S."""
    begins = view_begins(sizes, capacity)
    return [
        memory[begin : begin + capacity * size * size * 3].reshape(capacity, size, size, 3)
        for begin, size in zip(begins, sizes, strict=False)
    ]
