"""Clustering as a task: k-means on the features of one set, compared with its classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Measured, Outcome, Task, Want, refuse_unless_above

__all__ = ["Cluster"]


@dataclass(frozen=True, kw_only=True)
class Cluster(Task):
    """Group samples by k-means, without labels, and compare the groups with the classes."""

    name: ClassVar[str] = "cluster"
    live: ClassVar[bool] = True

    split: Literal["train", "test"] = "test"
    """Set whose samples are grouped and compared."""
    layer: str = "backbone"
    """What is grouped, scaled to length 1: backbone, head, or another layer (docs/evaluation.md)."""
    clusters: int | None = None
    """Number of groups; unset: the number of classes. With more, accuracy counts those that stand for a class."""
    num_init: int = 10
    """Starts (k-means++), of which the one with the least sum of squared distances counts."""
    max_iter: int = 300
    """Maximum number of iterations from a start."""

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(1, clusters=self.clusters)
        refuse_unless_above(0, num_init=self.num_init, max_iter=self.max_iter)
        check_layer(self.layer)

    def why_not(self, known: Known) -> str | None:
        """Ask for two classes, and a sample for each group."""
        counts = known.label_counts(self.split)
        if (counts > 0).sum() < 2:
            return f"the {self.split} set has samples of one class, so there is nothing to tell apart"
        if self.clusters is not None and counts.sum() < self.clusters:
            return f"--clusters is {self.clusters}, but the {self.split} set holds {counts.sum()} labeled samples"
        return None

    def wants(self) -> tuple[Want, ...]:
        """All of one set."""
        return (Want(split=self.split, layer=self.layer, unit=True),)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Agreement of groups and classes."""
        return {
            "accuracy": FigureInfo(
                title="k-means accuracy",
                caption="Share of samples whose group stands for their class, classes assigned to groups one to one as "
                "well as possible.",
            ),
            "nmi": FigureInfo(
                title="k-means NMI",
                caption="Mutual information of groups and classes, divided by the mean of their entropies.",
                unit="number",
            ),
            "ari": FigureInfo(
                title="k-means ARI",
                caption="Share of pairs of samples that groups and classes agree on, adjusted for chance (0) to at "
                "most 1.",
                unit="number",
            ),
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Group, then compare."""
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        from moco_fast.evaluation.kmeans import assigned_accuracy, kmeans

        features = inputs.features(*self.wants())
        labels = features.labels.numpy()
        k = len(set(labels.tolist())) if self.clusters is None else self.clusters
        values = features.values.to(inputs.device)
        found = kmeans(values, k=k, seed=inputs.seed, num_init=self.num_init, max_iter=self.max_iter)
        groups = found.assignment.cpu().numpy()
        return Outcome(
            figures={
                "accuracy": Measured(value=assigned_accuracy(groups, labels)),
                "nmi": Measured(value=float(normalized_mutual_info_score(labels, groups))),
                "ari": Measured(value=float(adjusted_rand_score(labels, groups))),
            },
            facts={"num_samples": len(features), "num_clusters": k},
        )
