"""Shuffled images of a training, decoded ahead by threads; what a task makes of each is the task's own."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from moco_fast.transfer.order import epoch_batches, steps_per_epoch
from pipelines.world import World

__all__ = ["ShuffledImages", "ahead"]

T = TypeVar("T")
Item = TypeVar("Item")

# Batches, or test images, that are decoded ahead of the one that is wanted.
_AHEAD = 4
# Threads that decode take the interpreter for moments, some ten times per image, and would each time wait 5 ms for a
# busy one: beside it two threads gave 51 images/s, and with this 68 (benchmarks/transfer_loader.py).
_SWITCHING_S = 1e-3


class ShuffledImages(ABC, Generic[T]):
    """Augmented batches of a set without end, from a step on; the same whatever the number of ranks and threads.

    An image that cannot be decoded is replaced by the next one of its kind.

    Args:
        where: the set, for people.
        keys: of its images.
        kinds: (N,) of each image; images of a kind are put together.
        batch_size: images of a step, over all ranks.
        group: images that are put together.
        factors: (N,) how often each image is wanted in an epoch; None: once.
        seed: of order and augmentation.
        world: each rank gets its part of every batch.
        threads: that decode.
        at_most_damaged: share of the set's images.

    Raises:
        ValueError: there are too few images for a batch.
    """

    def __init__(
        self,
        *,
        where: str,
        keys: list[str],
        kinds: npt.NDArray[np.bool_],
        batch_size: int,
        group: int,
        factors: npt.NDArray[np.float64] | None = None,
        seed: int,
        world: World,
        threads: int,
        at_most_damaged: float,
    ) -> None:
        self._where, self._keys, self._kinds, self._seed, self._world = where, keys, kinds, seed, world
        self._batch_size, self._group, self._factors = batch_size, group, factors
        self._steps = steps_per_epoch(kinds, batch_size=batch_size, group=group, factors=factors)
        if not self._steps:
            alike = f", of which {group} that lie or stand are put together" if group > 1 else ""
            raise ValueError(
                f"{where} has {len(keys):,} images to train on, too few for a batch of {batch_size}{alike}: give a "
                "smaller --batch-size"
            )
        self._pool = ThreadPoolExecutor(threads)
        # Batches are put together in their order, beside the training.
        self._gatherer = ThreadPoolExecutor(1)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        self._at_most_damaged = at_most_damaged * len(keys)
        self.damaged: dict[str, str] = {}
        """Images that this rank has replaced, with the reason."""

    @abstractmethod
    def draws(self, numbers: npt.NDArray[np.int64], *, epoch: int) -> list[Any]:
        """Return what is drawn for each image, as a function of seed, epoch and its number in `epoch_batches`."""

    @abstractmethod
    def make(self, number: int, drawn: Any) -> T:
        """Decode and augment an image. Raises OSError, SyntaxError: it cannot be decoded."""

    @abstractmethod
    def together(self, items: list[T]) -> Any:
        """Make a batch of this rank's images."""

    def __enter__(self) -> Self:
        self._switching_s = sys.getswitchinterval()
        sys.setswitchinterval(min(_SWITCHING_S, self._switching_s))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._gatherer.shutdown(cancel_futures=True)
        sys.setswitchinterval(self._switching_s)

    def batches(self, step: int) -> Generator[Any]:
        """Give this rank's part of each batch, from that of a step on."""
        for batch in ahead(self._begin, count(step)):
            yield batch.result()

    def _begin(self, step: int) -> Future[Any]:
        epoch, row = divmod(step, self._steps)
        share = self._batch_size // self._world.world_size
        entries = self._order_of(epoch)[row, self._world.rank * share :][:share]
        draws = self.draws(entries, epoch=epoch)
        numbers = entries % len(self._keys)
        # One batch is one task for each of its images, so that threads share it.
        pairs = zip(numbers, draws, strict=True)
        futures = [self._pool.submit(self.made, int(number), drawn) for number, drawn in pairs]
        return self._gatherer.submit(lambda: self.together([future.result() for future in futures]))

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = epoch_batches(
                self._kinds,
                seed=self._seed,
                epoch=epoch,
                batch_size=self._batch_size,
                group=self._group,
                factors=self._factors,
            )
            self._order = (epoch, order)
        return self._order[1]

    def made(self, number: int, drawn: Any) -> T:
        """Make an image, or the next one of its kind that can be decoded. Raises ValueError: too many cannot."""
        while True:
            try:
                return self.make(number, drawn)
            except (OSError, SyntaxError) as error:
                self._leave_out(self._keys[number], error)
            alike = np.flatnonzero(self._kinds == self._kinds[number])
            number = int(alike[np.searchsorted(alike, number, side="right") % len(alike)])

    def _leave_out(self, key: str, error: Exception) -> None:
        if key in self.damaged:
            return
        self.damaged[key] = str(error)
        print(f"{key} of {self._where} cannot be decoded ({error}): another image takes its place", file=sys.stderr)
        if len(self.damaged) > self._at_most_damaged:
            raise ValueError(
                f"{len(self.damaged)} images of {self._where} cannot be decoded, more than --max-malformed allows: "
                "copy them again, or allow a larger share"
            )


def ahead(begin: Callable[[Item], T], items: Iterable[Item]) -> Generator[T]:
    """Begin some items ahead of the one that is given, in their order."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > _AHEAD:
            yield begun.popleft()
    yield from begun
