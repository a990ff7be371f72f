"""What stands out in a set: near-duplicates, images like no other, labels that their neighbors do not share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moco_fast.embedding.faiss_index import FaissIndex
from moco_fast.embedding.index import Index
from moco_fast.embedding.neighbors import Neighbors, all_neighbors, approximate_neighbors
from shards.ground.arrays import Indices

__all__ = ["Explored", "explore"]

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What was found among N rows."""

    neighbors: Neighbors
    threshold: float
    """Cosine from which on two rows are near-duplicates."""
    labels: Indices
    """(N,), -1 where there is none."""
    group: Indices
    """(N,) the first row of each row's group of near-duplicates."""
    group_sizes: Indices
    """(N,) number of rows in each row's group: 1 if it has no near-duplicate."""
    likeness: npt.NDArray[np.float32]
    """(N,) mean cosine of each row's neighbors."""
    majority: Indices
    """(N,) the label that most of each row's neighbors have; -1 where none has more than half of them."""
    share: npt.NDArray[np.float32]
    """(N,) share of each row's neighbors that have the majority's label."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def duplicates(self) -> Indices:
        """Return the rows that have near-duplicates, in order."""
        return np.flatnonzero(self.group_sizes > 1)

    @property
    def groups(self) -> Indices:
        """Return the first row of each group of near-duplicates, largest group first."""
        first = np.flatnonzero((self.group_sizes > 1) & (self.group == np.arange(len(self))))
        return first[np.argsort(-self.group_sizes[first], kind="stable")]

    @property
    def dropped(self) -> Indices:
        """Return the rows that could go, in order: each is near one that stays."""
        return np.flatnonzero(self.neighbors.duplicates.stays != np.arange(len(self)))

    @property
    def outliers(self) -> Indices:
        """Return all rows, the one least like its neighbors first."""
        return np.argsort(self.likeness, kind="stable")

    @property
    def suspicious(self) -> Indices:
        """Return the labeled rows most of whose neighbors share another label, the clearest first."""
        rows = np.flatnonzero((self.labels >= 0) & (self.majority >= 0) & (self.majority != self.labels))
        return rows[np.lexsort((rows, -self.likeness[rows], -self.share[rows]))]


def explore(
    index: Index,
    *,
    k: int = 10,
    threshold: float = 0.95,
    device: torch.device,
    faster: FaissIndex | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> Explored:
    """Look at every row's neighbors.

    Args:
        index: written embeddings.
        k: neighbors that are looked at.
        threshold: cosine from which on two rows are near-duplicates.
        device: where to compute, if all pairs are compared.
        faster: an index of faiss to find neighbors by; None: all pairs are compared.
        tick: see `all_neighbors`.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if index.num_rows < 2:
        raise ValueError(f"{index.path} has {index.num_rows} vectors: it takes two to have neighbors")
    if faster is None:
        found = all_neighbors(index, k=k, threshold=threshold, device=device, tick=tick)
    else:
        found = approximate_neighbors(index, faster, k=k, threshold=threshold, tick=tick)
    labels = np.fromiter((-1 if row.label is None else row.label for row in index.all_rows()), np.int64)
    similarities = found.similarities.numpy()
    majority, share = _majorities(labels, found.rows.numpy())
    group = found.duplicates.groups()
    return Explored(
        neighbors=found,
        threshold=threshold,
        labels=labels,
        group=group,
        group_sizes=np.bincount(group)[group],
        likeness=similarities.mean(axis=1, dtype=np.float32),
        majority=majority,
        share=share,
    )


def _majorities(labels: Indices, neighbors: Indices) -> tuple[Indices, npt.NDArray[Any]]:
    """Return the label that more than half of each row's neighbors have, or -1, and its share of them, (N,) each."""
    majority = np.full(len(labels), -1)
    share = np.zeros(len(labels), dtype=np.float32)
    for begin in range(0, len(labels), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        near = labels[neighbors[part]]  # (n, k)
        # Of more than half, the one in the middle is one.
        middle = np.sort(near, axis=1)[:, near.shape[1] // 2]
        of_middle = (near == middle[:, None]).mean(axis=1)
        has_one = (of_middle > 0.5) & (middle >= 0)
        majority[part][has_one], share[part][has_one] = middle[has_one], of_middle[has_one]
    return majority, share
