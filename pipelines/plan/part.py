"""Order of chosen samples of a set: a pure function of (samples, seed, epoch, batch size). No I/O."""

from dataclasses import dataclass

import numpy as np

from pipelines.plan.order import check_ranks
from pipelines.plan.philox import stream_words
from shards.ground.arrays import Indices

__all__ = ["PartOrder", "PartPlan"]

# Second word of the Philox key; pipelines.plan.order has 1 to 4, pipelines.plan.augment 16.
_PART = 5


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """What all epochs over chosen samples have in common: each is a permutation of all of them.

    For a part that is read in any order, such as one in a hundred samples of a set: nothing is read side by side.

    Raises ValueError when the samples cannot fill one batch.
    """

    samples: Indices
    """(n,) dense sample numbers."""
    seed: int
    """0 to 2**64 - 1."""
    batch_size: int
    """Samples in a global step."""

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise ValueError(
                f"{self.num_samples} samples are chosen, less than one batch of {self.batch_size}: an epoch would have "
                f"no step; choose a batch size of at most {self.num_samples}, or more samples"
            )

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return len(self.samples)

    @property
    def num_steps(self) -> int:
        """Steps in an epoch, the same on every rank; less than a batch is left out, other samples in every epoch."""
        return self.num_samples // self.batch_size

    def shards_in_use(self, world_size: int) -> int:
        """Shards that a rank reads side by side: each sample may be in another one."""
        del world_size
        return self.num_samples

    def order(self, epoch: int) -> "PartOrder":
        """Return the order of an epoch."""
        return PartOrder(self, epoch)


class PartOrder:
    """The order of one epoch of chosen samples."""

    def __init__(self, plan: PartPlan, epoch: int) -> None:
        self._batch_size = plan.batch_size
        words = stream_words(plan.num_samples, counter=(epoch, 0, 0), key=(plan.seed, _PART))
        self._samples = np.asarray(plan.samples, dtype=np.int64)[np.argsort(words, kind="stable")]

    def rank_step(self, step: int, rank: int, world_size: int) -> Indices:
        """Dense sample numbers of one rank's share of a step: (batch_size / world_size,) int64."""
        check_ranks(self._batch_size, world_size)
        share = self._batch_size // world_size
        begin = step * self._batch_size + rank * share
        return self._samples[begin : begin + share]
