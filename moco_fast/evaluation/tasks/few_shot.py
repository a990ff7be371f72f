"""Few-shot classification as a task: episodes of a few classes with a few samples each, on frozen features.

Episodes and nearest centroids are those of few_shot.py of ssl-transfer (Ericsson et al. 2021), as in CD-FSL (Guo et al.
2020); logistic regression on features of length 1 is that of Tian et al. (2020).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Measured, Outcome, Task, Want, refuse_unless_above

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

__all__ = ["FewShot"]

Head = Literal["centroid", "logistic"]
_TITLES: dict[Head, str] = {"centroid": "nearest centroid", "logistic": "logistic"}


@dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Learn classes from a few samples each, in many random episodes (Ericsson et al. 2021, few_shot.py)."""

    name: ClassVar[str] = "few-shot"
    live: ClassVar[bool] = True

    split: Literal["both", "train", "test"] | None = None
    """Where episodes are drawn from: `both` sets together, or one alone, such as the novel classes of mini-ImageNet.
    Unset: both if both are there."""
    shots: tuple[int, ...] = (5, 1, 20, 50)
    """Samples of each class that are learned from; of several, the first gives the figure, the others stand beside
    it."""
    way: int = 5
    """Classes of an episode."""
    queries: int = 15
    """Samples of each class that are classified."""
    episodes: int = 600
    """Episodes for each number of shots."""
    heads: tuple[Head, ...] = ("centroid", "logistic")
    """What learns: the mean of each class, compared in Euclidean distance, or logistic regression on features of
    length 1."""
    c: float = 1.0
    """Inverse strength of the regression's penalty."""
    layer: str = "backbone"
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md)."""

    def with_sets(self, there: Collection[str]) -> Self:
        """Take both sets, or the one that is there."""
        if self.split is not None:
            return self
        only: tuple[Literal["train", "test"], ...] = ("train", "test")
        found = [split for split in only if split in there]
        return replace(self, split=found[0] if len(found) == 1 else "both")

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, shots=self.shots, queries=self.queries, c=self.c)
        refuse_unless_above(1, way=self.way, episodes=self.episodes)
        if not self.heads:
            raise ValueError("--heads names nothing: give centroid, logistic or both")
        check_layer(self.layer)

    def why_not(self, known: Known) -> str | None:
        """Count the classes that have enough samples for the easiest episodes."""
        # Classes that have no names are as many as labels ask for, which may differ from set to set.
        counts = zip_longest(*(known.label_counts(want.split).tolist() for want in self.wants()), fillvalue=0)
        needed = min(self.shots) + self.queries
        return self._too_few(sum(sum(of_class) >= needed for of_class in counts), needed)

    def wants(self) -> tuple[Want, ...]:
        """One set or both."""
        splits = ("train", "test") if self.split in (None, "both") else (self.split,)
        return tuple(Want(split=split, layer=self.layer) for split in splits)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Mean accuracy of each head with each number of shots."""
        return {
            f"{head}_{shots}_shot": FigureInfo(
                title=f"{self.way}-way {shots}-shot, {_TITLES[head]}",
                caption=f"Mean over {self.episodes} episodes of the share of queries that are classified rightly.",
            )
            for shots in self.shots
            for head in self.heads
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Draw episodes with each number of shots, learn and classify."""
        import torch

        features = [inputs.features(want) for want in self.wants()]
        labels = torch.cat([each.labels for each in features]).numpy()
        parts = [each.values for each in features]
        figures: dict[str, Measured] = {}
        notes: list[str] = []
        for shots in self.shots:
            needed = shots + self.queries
            counts = torch.from_numpy(labels).bincount()
            enough, there = int((counts >= needed).sum()), int((counts > 0).sum())
            if reason := self._too_few(enough, needed):
                notes.append(f"{shots}-shot is left out: {reason}")
                continue
            if enough < there:
                notes.append(
                    f"{shots}-shot draws from {enough} of {there} classes: the others have under {needed} samples"
                )
            accuracies = self._accuracies(parts, labels, shots, inputs)
            for head, of_head in accuracies.items():
                mean, half = of_head.mean(), 1.96 * of_head.std() / math.sqrt(self.episodes)
                figures[f"{head}_{shots}_shot"] = Measured(
                    value=float(mean), interval=(float(mean - half), float(mean + half))
                )
        if not figures:
            raise ValueError(notes[0])
        return Outcome(figures=figures, facts={"num_samples": len(labels)}, notes=tuple(notes))

    def _too_few(self, enough: int, needed: int) -> str | None:
        """Say that classes with enough samples are too few; None: they are not."""
        if enough >= self.way:
            return None
        return f"{self.way} classes need {needed} samples each, and {enough} have so many"

    def _accuracies(
        self, parts: "Sequence[Tensor]", labels: "npt.NDArray[np.int64]", shots: int, inputs: Inputs
    ) -> "dict[Head, npt.NDArray[np.float64]]":
        """Return the accuracy of each head in each episode."""
        import torch

        from moco_fast.evaluation.few_shot import centroid_accuracy, chunks, draw_episodes, logistic_accuracy, rows_of

        episodes = draw_episodes(
            labels, way=self.way, per_class=shots + self.queries, num=self.episodes, seed=(inputs.seed, shots)
        )
        found: dict[Head, list[Tensor]] = {head: [] for head in self.heads}
        for rows in chunks(episodes, parts[0].shape[1]):
            values = rows_of(parts, rows, inputs.device)
            support, queries = values[:, :, :shots], values[:, :, shots:]
            for head, of_head in found.items():
                is_centroid = head == "centroid"
                of_head.append(
                    centroid_accuracy(support, queries)
                    if is_centroid
                    else logistic_accuracy(support, queries, c=self.c)
                )
        return {head: torch.cat(of_head).numpy() for head, of_head in found.items()}
