"""What is known of sets before anything is computed: whether they allow a task, and what is to be said of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moco_fast.evaluation.base import Split, Task
from moco_fast.evaluation.labels import common_classes, label_counts, may_have_labels
from shards.ground.units import counted
from shards.sets import ShardSet

__all__ = ["KnownSets", "OpenSets", "notes_on", "why_sets_do_not_allow"]

_NAMES = 3  # classes that a note names


class KnownSets(ABC):
    """What tasks may ask of sets; see moco_fast.evaluation.base.Known."""

    at_most: Mapping[Split, int]
    """Bounds the samples of a set that are looked at."""

    @property
    @abstractmethod
    def sets(self) -> Mapping[Split, ShardSet]:
        """The sets that are open."""

    @property
    def num_classes(self) -> int:
        """Classes that have names; of shards that others wrote, whose classes have none, as many as labels ask for."""
        return max(_num_classes(self.sets[split]) for split in ("train", "test") if split in self.sets)

    def set_of(self, split: Split) -> ShardSet:
        """Return the set of a split."""
        return self.sets[split]

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the name of each label of a set."""
        return self.sets[split].class_names

    def label_sets(self, split: Split) -> npt.NDArray[np.int8] | None:
        """Return the classes of each sample of a set, where labels are sets."""
        shards = self.sets[split]
        if not shards.manifest.has_label_sets:
            return None
        return np.concatenate([shards.label_sets(shard) for shard in range(shards.num_shards)])

    def label_counts(self, split: Split) -> npt.NDArray[np.int64]:
        """Return how many samples of a set have each label, of those that are looked at."""
        return label_counts(self.sets[split], self.at_most.get(split))


@dataclass(frozen=True, kw_only=True)
class OpenSets(KnownSets):
    """Sets, without an encoder."""

    opened: Mapping[Split, ShardSet]
    at_most: Mapping[Split, int] = field(default_factory=dict[Split, int])
    """Bounds the samples of a set that are looked at."""

    @property
    def sets(self) -> Mapping[Split, ShardSet]:
        """The sets that are open."""
        return self.opened


def why_sets_do_not_allow(task: Task, known: KnownSets) -> str | None:
    """Say why sets do not allow a settled task; None: they do."""
    sets = known.sets
    if absent := task.splits - sets.keys():
        return f"it needs a {'training' if 'train' in absent else 'test'} set"
    looked_at = [shards for split, shards in sets.items() if split in task.splits]
    several = [shards.where for shards in looked_at if shards.manifest.has_label_sets]
    if task.needs_labels and not task.takes_label_sets and several:
        return (
            f"{several[0]} has a set of classes for each sample, where {task.name} needs one class: "
            "such sets are measured by svm"
        )
    unlabeled = [shards.where for shards in looked_at if not may_have_labels(shards)]
    if task.needs_labels and unlabeled and not several:
        return f"{unlabeled[0]} holds no labeled sample, so there is nothing to compare: pack it with labels"
    if several and len(several) < len(looked_at):
        return f"{several[0]} has a set of classes for each sample, and another set has one class: take two of a kind"
    if task.needs_labels and task.splits >= {"train", "test"}:
        try:
            common_classes(sets["train"], sets["test"])
        except ValueError as error:
            return str(error)
    if task.needs_labels and "train" in task.splits and (known.label_counts("train") > 0).sum() == 1:
        return f"{sets['train'].where} has samples of one class, so there is nothing to tell apart: give two at least"
    return task.why_not(known)


def notes_on(task: Task, known: KnownSets) -> tuple[str, ...]:
    """Say what figures of a task suffer from that its sets allow."""
    if not task.classifies:
        return ()
    counts = np.zeros((2, known.num_classes), dtype=np.int64)
    for row, split in zip(counts, ("train", "test"), strict=True):
        of_split = known.label_counts(split)
        row[: len(of_split)] = of_split
    train, test = counts
    unseen = np.flatnonzero((train == 0) & (test > 0)).tolist()
    if not unseen:
        return ()
    names = known.class_names("test") or [str(number) for number in range(known.num_classes)]
    listed = ", ".join(names[number] for number in unseen[:_NAMES])
    rest = f" and {len(unseen) - _NAMES} more" if len(unseen) > _NAMES else ""
    classes = counted(len(unseen), "class", plural="classes")
    samples = counted(int(test[unseen].sum()), "test sample")
    where = known.set_of("test").where
    return (f"{classes} of {where} without a training sample ({listed}{rest}): {samples} of them count as wrong",)


def _num_classes(shards: ShardSet) -> int:
    return len(shards.class_names) or len(label_counts(shards))
