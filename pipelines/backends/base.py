"""Backend: what makes views of encoded samples, its job and what it gives."""

from dataclasses import dataclass
from typing import Protocol

import torch

from pipelines.config import ViewSpec
from pipelines.plan.draw import Draw
from pipelines.reading.decoded import DecodedCache
from shards import ShardSet
from shards.ground.arrays import Indices

__all__ = ["Job", "Made", "Stream"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A batch as a backend gives it."""

    samples: Indices
    """(B,) dense sample numbers."""
    labels: Indices
    """(B,), -1 where there is none."""
    views: tuple[torch.Tensor, ...]
    """(B, 3, H, W) uint8 each, channels_last."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another took the place of."""


class Stream(Protocol):
    """A running backend."""

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        ...

    def close(self) -> None:
        """End all threads and processes; what is ready is dropped."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a backend is to do."""

    shards: ShardSet
    draw: Draw
    """Gives the views' tables from (epoch, samples, records). Can be pickled."""
    views: tuple[ViewSpec, ...]
    """What to make of each sample: sizes, and which stages there can be."""
    max_batch: int
    """Samples in the largest batch."""
    device: torch.device
    """Where the views are wanted."""
    num_threads: int
    """Threads or processes that decode."""
    skip: bool = False
    """Replace samples that are damaged, instead of ending."""
    read_threads: int = 4
    """Threads that read shards."""
    prefetch: int = 2
    """Batches kept ready."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the GPU's own engines."""
    decoded: DecodedCache | None = None
    """Where decoded pixels are kept."""
