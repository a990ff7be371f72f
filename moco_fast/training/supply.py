"""Supply of batches: the loader's, epoch after epoch, some of which can be held back to time steps without loading."""

from collections import deque
from collections.abc import Iterator

from pipelines.batch import Batch
from pipelines.loader import Loader

__all__ = ["Supply"]


class Supply:
    """Batches in the loader's order, whether they are held back for a while or not.

    The loader counts a batch as handed over when it is fetched, this one when it is used: a checkpoint that is saved
    while batches are held back continues with the first of them.
    """

    def __init__(self, loader: Loader):
        self._loader = loader
        self._batches = self._endless()
        self._held: deque[tuple[Batch, dict[str, int]]] = deque()
        self._place = loader.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._place = self._held.popleft() if self._held else self._fetch()
        return batch

    @property
    def num_held(self) -> int:
        """Batches that are held back."""
        return len(self._held)

    def hold(self) -> int:
        """Fetch one more batch and keep it until it is its turn; return the bytes of its views.

        A copy is kept: the loader takes its own memory back when the next batch is fetched.
        """
        batch, place = self._fetch()
        copy = Batch(views=tuple(view.clone() for view in batch.views), index=batch.index, label=batch.label)
        self._held.append((copy, place))
        return sum(view.numel() * view.element_size() for view in copy.views)

    def state_dict(self) -> dict[str, int]:
        """Place of the next batch, counted in batches used (`Loader.state_dict`)."""
        return self._place

    def _fetch(self) -> tuple[Batch, dict[str, int]]:
        batch = next(self._batches)
        return batch, self._loader.state_dict()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._loader
