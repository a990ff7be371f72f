"""k-means on frozen features, on their device, and how well clusters agree with classes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["Clusters", "assigned_accuracy", "kmeans", "lloyd"]

_CHUNK_ELEMENTS = 1 << 25  # distances held at once: 128 MiB of float32


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What k-means found."""

    assignment: Tensor
    """(N,) int64: the nearest center of each sample."""
    centers: Tensor
    """(k, D)."""
    inertia: float
    """Sum of the squared distances to the nearest centers."""


def kmeans(values: Tensor, *, k: int, seed: int, num_init: int, max_iter: int) -> Clusters:
    """Find clusters from several starts (k-means++, Arthur & Vassilvitskii 2007); those with the least inertia count.

    Args:
        values: (N, D) float32, N at least k.
        k: number of clusters.
        seed: of the starts.
        num_init: starts.
        max_iter: iterations from each.
    """
    mean = values.mean(dim=0)
    values = values - mean  # distances of centered features lose less to rounding
    generator = torch.Generator().manual_seed(seed)
    found = [lloyd(values, _start(values, k, generator), max_iter=max_iter) for _ in range(num_init)]
    best = min(found, key=lambda clusters: clusters.inertia)
    return Clusters(assignment=best.assignment, centers=best.centers + mean, inertia=best.inertia)


def lloyd(values: Tensor, centers: Tensor, *, max_iter: int) -> Clusters:
    """Improve centers until no sample changes its cluster (Lloyd's algorithm).

    A cluster without samples begins again at one of the samples that are farthest from their centers.

    Args:
        values: (N, D) float32.
        centers: (k, D), on the same device.
        max_iter: at most so many times.
    """
    assignment, distances = _nearest(values, centers)
    for _ in range(max_iter):
        centers = _means(values, assignment, distances, len(centers))
        before = assignment
        assignment, distances = _nearest(values, centers)
        if torch.equal(assignment, before):
            break
    return Clusters(assignment=assignment, centers=centers, inertia=float(distances.sum(dtype=torch.float64)))


def _start(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw samples as centers, each with a chance in proportion to its squared distance from those drawn before."""
    chances = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    centers = values.new_empty(k, values.shape[1])
    weights = values.new_ones(len(values))
    for number, chance in enumerate(chances):
        ends = weights.double().cumsum(dim=0)
        row = int(torch.searchsorted(ends, chance * ends[-1], right=True).clamp(max=len(values) - 1))
        centers[number] = values[row]
        distances = (values - values[row]).square().sum(dim=1)
        weights = distances if number == 0 else torch.minimum(weights, distances)
    return centers


def _nearest(values: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest center of each sample, and the squared distance to it: (N,), (N,)."""
    assignment: list[Tensor] = []
    distances: list[Tensor] = []
    for chunk in values.split(_rows(centers)):
        nearest = (centers.square().sum(dim=1) - 2 * chunk @ centers.T).min(dim=1)
        assignment.append(nearest.indices)
        distances.append((nearest.values + chunk.square().sum(dim=1)).clamp(min=0))
    return torch.cat(assignment), torch.cat(distances)


def _means(values: Tensor, assignment: Tensor, distances: Tensor, k: int) -> Tensor:
    # By matrix products: sums by index are in another order on a GPU each time.
    sums = values.new_zeros(k, values.shape[1])
    for chunk, clusters in zip(values.split(_rows(sums)), assignment.split(_rows(sums)), strict=True):
        sums += one_hot(clusters, k).to(values.dtype).T @ chunk
    counts = assignment.bincount(minlength=k)
    empty = counts == 0
    centers = sums / counts.clamp(min=1)[:, None]
    centers[empty] = values[distances.topk(int(empty.sum())).indices]
    return centers


def _rows(centers: Tensor) -> int:
    return max(_CHUNK_ELEMENTS // len(centers), 1)


def assigned_accuracy(clusters: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> float:
    """Return the share of samples that are right if each cluster stands for one class, assigned as well as possible.

    Clusters beyond the number of classes stand for none (Kuhn's Hungarian method, as Xie et al. 2016 count).

    Args:
        clusters: (N,) at least 0.
        labels: (N,) at least 0.
    """
    from scipy.optimize import linear_sum_assignment

    together = np.zeros((clusters.max() + 1, labels.max() + 1), dtype=np.int64)
    np.add.at(together, (clusters, labels), 1)
    return float(together[linear_sum_assignment(together, maximize=True)].sum() / len(labels))
