"""Few-shot episodes on frozen features: their samples, and heads that learn from a few samples of each class."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.evaluation.regression import fit_logistic

__all__ = ["centroid_accuracy", "draw_episodes", "logistic_accuracy", "rows_of"]

_CHUNK_ELEMENTS = 1 << 24  # features of episodes computed at once: 64 MiB of float32


def draw_episodes(
    labels: npt.NDArray[np.int64], *, way: int, per_class: int, num: int, seed: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Draw the samples of episodes: `way` classes that have enough samples, and as many of each, none of them twice.

    Args:
        labels: (N,) at least 0.
        way: classes of an episode.
        per_class: samples of a class, for support and queries.
        num: episodes. Each is drawn by the seed and its number alone.
        seed: of the draw.

    Returns:
        (num, way, per_class) rows, in random order.
    """
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rows = [of_class for of_class in rows if len(of_class) >= per_class]
    found = np.empty((num, way, per_class), dtype=np.int64)
    for episode in range(num):
        rng = np.random.default_rng((*seed, episode))
        for place, number in enumerate(rng.choice(len(rows), way, replace=False)):
            found[episode, place] = rng.choice(rows[number], per_class, replace=False)
    return found


def chunks(episodes: npt.NDArray[np.int64], dim: int) -> Iterator[Tensor]:
    """Give episodes in parts whose features of D numbers are computed at once."""
    of_one = episodes[0].size * dim
    yield from torch.from_numpy(episodes).split(max(_CHUNK_ELEMENTS // of_one, 1))


def rows_of(parts: Sequence[Tensor], rows: Tensor, device: torch.device) -> Tensor:
    """Pick rows of tensors that count as one, on the device: (N_p, D) each, (...) -> (..., D)."""
    flat = rows.flatten()
    found = torch.empty(len(flat), parts[0].shape[1], dtype=parts[0].dtype, device=device)
    begin = 0
    for part in parts:
        mine = (flat >= begin) & (flat < begin + len(part))
        found[mine.to(device)] = part[(flat[mine] - begin).to(part.device)].to(device)
        begin += len(part)
    return found.unflatten(0, rows.shape)


def centroid_accuracy(support: Tensor, queries: Tensor) -> Tensor:
    """Classify queries by the nearest mean of a class's support, in Euclidean distance (Snell et al. 2017).

    Args:
        support: (E, way, shots, D).
        queries: (E, way, num_queries, D).

    Returns:
        (E,) float64 share of each episode's queries that are classified rightly.
    """
    # Not by a matrix product, which loses what is left of two large numbers.
    distances = torch.cdist(queries.flatten(1, 2), support.mean(dim=2), compute_mode="donot_use_mm_for_euclid_dist")
    return _accuracy(-distances, queries)


def logistic_accuracy(support: Tensor, queries: Tensor, *, c: float, max_iter: int = 1000) -> Tensor:
    """Classify queries by logistic regression on the support, features of length 1 (Tian et al. 2020).

    Shapes as those of `centroid_accuracy`.

    Args:
        support: (E, way, shots, D).
        queries: (E, way, num_queries, D).
        c: inverse strength of the penalty.
        max_iter: of L-BFGS, which fits all episodes at once.
    """
    num, way, shots, _ = support.shape
    labels = torch.arange(way, device=support.device).repeat_interleave(shots).expand(num, -1)
    values = normalize(support, dim=-1).flatten(1, 2)
    fit = fit_logistic(values, labels, num_classes=way, c=c, max_iter=max_iter)
    return _accuracy(fit.scores(normalize(queries, dim=-1).flatten(1, 2)), queries)


def _accuracy(scores: Tensor, queries: Tensor) -> Tensor:
    """Compare (E, way * num_queries, way) scores with the classes of the queries: (E,)."""
    _, way, num_queries, _ = queries.shape
    labels = torch.arange(way, device=scores.device).repeat_interleave(num_queries)
    return (scores.argmax(dim=2) == labels).double().mean(dim=1).cpu()
