"""Steps of a rank: which samples its batches hold, one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from pipelines.plan.order import OrderPlan
from pipelines.plan.part import PartPlan
from pipelines.world import World
from shards.ground.arrays import Indices

__all__ = ["EpochSteps", "ListedSteps", "Steps"]


class Steps(Protocol):
    """What a rank reads, batch after batch. Can be pickled, and iterated more than once."""

    def __iter__(self) -> Iterator[tuple[int, Indices]]:
        """Give (epoch, dense sample numbers) of each batch."""
        ...

    @property
    def num_steps(self) -> int:
        """Batches until they end, or until all samples come again."""
        ...

    @property
    def shards_in_use(self) -> int:
        """Shards that are read side by side, at most."""
        ...


@dataclass(frozen=True, kw_only=True)
class EpochSteps:
    """A rank's shares of a plan's steps from a place on, over the epochs' ends, without end."""

    plan: OrderPlan | PartPlan
    epoch: int
    step: int
    world: World

    @property
    def num_steps(self) -> int:
        """Batches of an epoch."""
        return self.plan.num_steps

    @property
    def shards_in_use(self) -> int:
        """Shards that are read side by side, at most."""
        return self.plan.shards_in_use(self.world.world_size)

    def __iter__(self) -> Iterator[tuple[int, Indices]]:
        """Give (epoch, dense sample numbers) of each batch."""
        for epoch in count(self.epoch):
            order = self.plan.order(epoch)
            for step in range(self.step if epoch == self.epoch else 0, self.plan.num_steps):
                yield epoch, order.rank_step(step, self.world.rank, self.world.world_size)


@dataclass(frozen=True, kw_only=True)
class ListedSteps:
    """Given samples in their order, in batches; the last one may be short."""

    samples: Indices
    batch_size: int
    epoch: int

    @property
    def num_steps(self) -> int:
        """All batches."""
        return -(-len(self.samples) // self.batch_size)

    @property
    def shards_in_use(self) -> int:
        """As many as a batch has samples."""
        return self.batch_size

    def __iter__(self) -> Iterator[tuple[int, Indices]]:
        """Give (epoch, dense sample numbers) of each batch."""
        for begin in range(0, len(self.samples), self.batch_size):
            yield self.epoch, self.samples[begin : begin + self.batch_size]
