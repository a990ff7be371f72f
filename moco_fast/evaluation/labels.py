"""Labels of evaluations: classes that sets share, and the part of a training set on which options are chosen."""

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.sets import ShardSet

__all__ = ["choice_split", "common_classes", "label_counts", "may_have_labels", "mean_per_class"]


_COUNTED: WeakKeyDictionary[ShardSet, npt.NDArray[np.int64]] = WeakKeyDictionary()


def label_counts(shards: ShardSet) -> npt.NDArray[np.int64]:
    """Return how many samples of a set have each label, (C,): as many classes as have names, or as labels ask for.

    A set is counted once: every task asks, and the indexes of a billion samples take minutes.
    """
    if shards not in _COUNTED:
        _COUNTED[shards] = _count(shards)
    return _COUNTED[shards]


def _count(shards: ShardSet) -> npt.NDArray[np.int64]:
    counts = np.zeros(len(shards.class_names), dtype=np.int64)
    for shard in range(shards.num_shards):
        labels = shards.index(shard)["label"]
        of_shard = np.bincount(labels[labels >= 0], minlength=len(counts))
        of_shard[: len(counts)] += counts
        counts = of_shard
    return counts


def common_classes(bank: ShardSet, queries: ShardSet) -> tuple[str, ...]:
    """Return the class names that two sets of shards share, in the order of their labels.

    Raises:
        ValueError: the sets number their classes differently.
    """
    if bank.class_names == queries.class_names:
        return bank.class_names
    odd = sorted(set(bank.class_names) ^ set(queries.class_names))
    what = f"{odd[0]!r} is in one only" if odd else "the same names in another order"
    raise ValueError(
        f"{bank.where} and {queries.where} number their classes differently ({what}): pack both from folders with the "
        "same class names"
    )


def may_have_labels(shards: ShardSet) -> bool:
    """Whether samples have one label each: classes have names, or, in shards of others, the first shard has labels."""
    if shards.manifest.has_label_sets:
        return False
    return bool(shards.class_names) or (shards.num_shards > 0 and bool((shards.index(0)["label"] >= 0).any()))


def choice_split(labels: Tensor, *, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Divide a training set into what is fitted and what decides between options, by the same share of every class.

    Args:
        labels: (N,) int64, all at least 0, on the host.
        share: of each class that decides; one sample at least of every class that has two.
        seed: of the draw.

    Returns:
        (F,) and (N - F,) rows, in rising order.

    Raises:
        ValueError: no class has two samples.
    """
    rng = np.random.default_rng(seed)
    numbers = labels.numpy()
    decides = np.zeros(len(numbers), dtype=bool)
    for label in np.unique(numbers):
        rows = np.flatnonzero(numbers == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        decides[rng.permutation(rows)[:count]] = True
    if not decides.any():
        raise ValueError(
            "options are chosen on a part of the training set, but no class has two samples there: give more"
        )
    return torch.from_numpy(np.flatnonzero(~decides)), torch.from_numpy(np.flatnonzero(decides))


def mean_per_class(right: Tensor, labels: Tensor, *, num_classes: int) -> float:
    """Return the mean over classes of the share of their samples that are right; classes without samples do not count.

    Args:
        right: (N,) bool.
        labels: (N,) int64 in 0..num_classes-1.
        num_classes: number of classes.
    """
    total = labels.bincount(minlength=num_classes)
    hits = labels[right].bincount(minlength=num_classes)
    there = total > 0
    return float((hits[there].double() / total[there]).mean())
