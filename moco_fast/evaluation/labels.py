"""Labels of evaluations: classes that sets share, and the part of a training set on which options are chosen."""

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moco_fast import distributed
from moco_fast.evaluation.features import evenly
from shards.ground.arrays import Records
from shards.ground.threads import mapped
from shards.sets import ShardSet

__all__ = [
    "choice_split",
    "common_classes",
    "count_labels_together",
    "label_counts",
    "may_have_labels",
    "mean_per_class",
]


_COUNTED: WeakKeyDictionary[ShardSet, dict[int, npt.NDArray[np.int64]]] = WeakKeyDictionary()
_INDEXES_AT_A_TIME = 16


def label_counts(shards: ShardSet, at_most: int | None = None) -> npt.NDArray[np.int64]:
    """Return how many samples of a set have each label, (C,): as many classes as have names, or as labels ask for.

    A set is counted once: every task asks, and the indexes of a billion samples take minutes.

    Args:
        shards: the set.
        at_most: counts among so many samples, evenly spread; None: among all.
    """
    counted, num_counted = _counted(shards, at_most)
    if num_counted not in counted:
        counted[num_counted] = _count(shards, num_counted)
    return counted[num_counted]


def count_labels_together(shards: ShardSet, at_most: int | None = None) -> None:
    """Let the first rank count for all, which `label_counts` knows on every rank from then on; collective."""
    with distributed.leaving_together():
        counts = label_counts(shards, at_most) if distributed.rank() == 0 else None
    counted, num_counted = _counted(shards, at_most)
    counts = distributed.tell_all(counts)
    assert counts is not None
    counted[num_counted] = counts


def _counted(shards: ShardSet, at_most: int | None) -> tuple[dict[int, npt.NDArray[np.int64]], int]:
    """Return what is known of a set, by the number of samples that were counted, and which of it is asked for."""
    num_samples = shards.num_samples
    return _COUNTED.setdefault(shards, {}), num_samples if at_most is None else min(at_most, num_samples)


def _count(shards: ShardSet, num_counted: int) -> npt.NDArray[np.int64]:
    num_classes = len(shards.class_names)
    if num_counted < shards.num_samples:
        return _bincount(shards.records_of(evenly(shards.num_samples, num_counted)), num_classes)
    counts = np.zeros(num_classes, dtype=np.int64)
    numbers = range(shards.num_shards)
    for _, records in mapped(shards.index, numbers, threads=_INDEXES_AT_A_TIME, ahead=_INDEXES_AT_A_TIME):
        of_shard = _bincount(records, len(counts))
        of_shard[: len(counts)] += counts
        counts = of_shard
    return counts


def _bincount(records: Records, num_classes: int) -> npt.NDArray[np.int64]:
    labels = records["label"]
    return np.bincount(labels[labels >= 0], minlength=num_classes)


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
