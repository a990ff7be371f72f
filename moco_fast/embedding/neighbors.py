"""Neighbors of all rows of written embeddings among each other, and the groups that near-duplicates form.

Each pair of rows is compared once, a square of `_SIDE` rows by `_SIDE` at a time. A block of rows stays in memory while
all that follow it are read past it: with N rows of D numbers the file is read N * 4 D / (2 * `_BLOCK_BYTES`) times, and
what grows with N in memory are the k neighbors of each row alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.embedding.faiss_index import FaissIndex
from moco_fast.embedding.index import Index
from moco_fast.embedding.search import highest
from shards.ground.arrays import Indices

__all__ = ["NearDuplicates", "Neighbors", "all_neighbors", "approximate_neighbors"]

_SIDE = 4096
_BLOCK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


class NearDuplicates:
    """Near-duplicates: their groups, and which of them would stay if the others were dropped.

    A row stays unless an earlier one that stays is near it. So what is dropped is near what stays in its place, while
    rows of a group may be connected through others alone: in a long chain of them several stay.

    Args:
        num_rows: each is a group of its own, and stays, at first.

    Attributes:
        stays: (N,) the row that stays in the place of each row: itself, if it does.
        similarity: (N,) float32 cosine of each row and the one that stays.
    """

    def __init__(self, num_rows: int) -> None:
        self.stays: Indices = np.arange(num_rows)
        self.similarity = np.ones(num_rows, dtype=np.float32)
        self._above: Indices = np.arange(num_rows)

    def add(self, rows: Indices, others: Indices, similarities: npt.NDArray[np.float32]) -> None:
        """Add (n,) pairs of near rows, after all those that say whether the earlier one of a pair stays."""
        if not len(rows):
            return
        left, right = np.minimum(rows, others), np.maximum(rows, others)
        _, first_of = np.unique(left * len(self.stays) + right, return_index=True)  # Each once, by rising `left`.
        left, right, similarities = left[first_of], right[first_of], similarities[first_of]
        self._join(left, right)
        begins = np.flatnonzero(np.diff(left, prepend=-1))
        for begin, end in pairwise([*begins.tolist(), len(left)]):
            if self.stays[left[begin]] == left[begin]:
                near = right[begin:end]
                is_new = self.stays[near] == near
                self.stays[near[is_new]] = left[begin]
                self.similarity[near[is_new]] = similarities[begin:end][is_new]

    def groups(self) -> Indices:
        """Return (N,) the first row of each row's group: of those that are connected, directly or through others."""
        return self._first(np.arange(len(self._above)))

    def _join(self, left: Indices, right: Indices) -> None:
        roots, places = np.unique(np.concatenate([self._first(left), self._first(right)]), return_inverse=True)
        ones = np.ones(len(left), dtype=bool)
        graph = coo_matrix((ones, (places[: len(left)], places[len(left) :])), shape=(len(roots), len(roots)))
        _, joined = connected_components(graph, directed=False)
        # The roots rise, so the first one with a number is the smallest.
        _, smallest = np.unique(joined, return_index=True)
        self._above[roots] = roots[smallest][joined]

    def _first(self, rows: Indices) -> Indices:
        found = self._above[rows]
        while not np.array_equal(above := self._above[found], found):
            found = above
        self._above[rows] = found
        return found


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The rows nearest to each of N rows, itself left out, and near-duplicates."""

    similarities: Tensor
    """(N, k) float32 cosines, highest first."""
    rows: Tensor
    """(N, k) int64; of equal ones the first row first. -1, with a similarity of -inf, where none was found."""
    duplicates: NearDuplicates


class _Nearest:
    """The nearest rows so far of every row."""

    def __init__(self, num_rows: int, k: int, device: torch.device) -> None:
        self.similarities = torch.full((num_rows, k), -torch.inf, device=device)
        self.rows = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)

    def add(self, first: int, highest_of: Tensor, rows_of: Callable[[Tensor], Tensor], first_other: int) -> None:
        """Add the similarities of rows from `first` on to later and later others, from `first_other` on.

        Args:
            first: number of the first row.
            highest_of: (n,) each row's highest similarity.
            rows_of: gives (m, others) similarities of m of these rows, by their (m,) places.
            first_other: number of the first of the others.
        """
        part = slice(first, first + len(highest_of))
        # Few rows find a nearer neighbor once some thousand were seen, and a maximum is cheaper than a selection.
        nearer = (highest_of > self.similarities[part, -1]).nonzero().flatten()
        if not len(nearer):
            return
        found, places = highest(rows_of(nearer), self.rows.shape[1])
        best = torch.cat([self.similarities[part][nearer], found], dim=1)
        rows = torch.cat([self.rows[part][nearer], places + first_other], dim=1)
        best, order = highest(best, self.rows.shape[1])
        self.similarities[part][nearer], self.rows[part][nearer] = best, rows.gather(1, order)


@torch.no_grad()
def all_neighbors(
    index: Index, *, k: int, threshold: float, device: torch.device, tick: Callable[[int], object] = lambda _: None
) -> Neighbors:
    """Find the k nearest rows of every row, and all pairs of at least the threshold, exactly.

    Args:
        index: at least two rows; vectors need not have length 1.
        k: how many; all others, if there are fewer.
        threshold: cosine from which on two rows are near-duplicates.
        device: where to compute.
        tick: is given the number of pairs that were compared, now and then; N * (N + 1) / 2 in all.
    """
    nearest = _Nearest(index.num_rows, min(k, index.num_rows - 1), device)
    duplicates = NearDuplicates(index.num_rows)

    def compare(first: int, left: Tensor, first_other: int, right: Tensor) -> None:
        similarities = left @ right.T
        is_same = first == first_other
        if is_same:
            similarities.fill_diagonal_(-torch.inf)
        highest_of = similarities.amax(dim=1)
        nearest.add(first, highest_of, lambda rows: similarities[rows], first_other)
        if not is_same:
            nearest.add(first_other, similarities.amax(dim=0), lambda rows: similarities[:, rows].T.contiguous(), first)
        near = (highest_of >= threshold).nonzero().flatten()
        if len(near):
            values = similarities[near]
            place, other = (values >= threshold).nonzero(as_tuple=True)
            pairs = (near[place] + first, other + first_other, values[place, other])
            duplicates.add(*(each.cpu().numpy() for each in pairs))
        tick(len(left) * (len(left) + 1) // 2 if is_same else similarities.numel())

    begin = 0
    while begin < index.num_rows:
        block: list[tuple[int, Tensor]] = []
        held_bytes, is_full = 0, False
        for first, vectors in _squares(index, begin, device):
            for first_held, held in block:
                compare(first_held, held, first, vectors)
            is_full = is_full or held_bytes + vectors.nbytes > max(_BLOCK_BYTES[device.type], vectors.nbytes)
            if not is_full:
                compare(first, vectors, first, vectors)
                block.append((first, vectors))
                held_bytes, begin = held_bytes + vectors.nbytes, first + len(vectors)
    return Neighbors(similarities=nearest.similarities.cpu(), rows=nearest.rows.cpu(), duplicates=duplicates)


@torch.no_grad()
def approximate_neighbors(
    index: Index, faster: FaissIndex, *, k: int, threshold: float, tick: Callable[[int], object] = lambda _: None
) -> Neighbors:
    """Find what `all_neighbors` does among what an index of faiss finds; of pairs, those among the k nearest alone.

    Arguments as there; `faster` is of the same embeddings.
    """
    num_rows, k = index.num_rows, min(k, index.num_rows - 1)
    similarities, rows = torch.empty(num_rows, k), torch.empty(num_rows, k, dtype=torch.int64)
    for first, chunk in index.chunks():
        part = slice(first, first + len(chunk))
        found, near = faster.nearest(torch.tensor(chunk), k + 1)
        is_other = near != torch.arange(num_rows)[part, None]
        is_other[is_other.all(dim=1), -1] = False  # Itself is among the nearest, but for what the index rounds.
        similarities[part], rows[part] = found[is_other].view(-1, k), near[is_other].view(-1, k)
        tick(len(chunk) * (num_rows + 1) // 2)
    duplicates = NearDuplicates(num_rows)
    row, place = (similarities >= threshold).nonzero(as_tuple=True)
    duplicates.add(*(each.numpy() for each in (row, rows[row, place], similarities[row, place])))
    return Neighbors(similarities=similarities, rows=rows, duplicates=duplicates)


def _squares(index: Index, begin: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Give vectors of length 1 from a row on, at most `_SIDE` at a time, each with the first one's row."""
    for first, chunk in index.chunks(begin):
        for place in range(0, len(chunk), _SIDE):
            part = torch.tensor(chunk[place : place + _SIDE]).to(device).float()
            yield first + place, normalize(part)
