"""Health of an encoder as a task, without labels: effective rank, spectrum, uniformity and what has collapsed.

RankMe is the effective rank of Garrido et al. (2023), alignment and uniformity are those of Wang & Isola (2020), the
spread is what Chen & He (2021, section 4.1) watch for collapse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want, refuse_unless_above

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.config import Config

__all__ = ["Health"]


@dataclass(frozen=True, kw_only=True)
class Health(Task):
    """Tell from features alone how many directions they use, and what has collapsed; needs no labels."""

    name: ClassVar[str] = "health"
    draws: ClassVar[bool] = False
    live: ClassVar[bool] = True

    split: Literal["train", "test"] = "train"
    """Set whose features are looked at."""
    layer: str = "backbone"
    """Whose output they are: backbone, head, or another layer (docs/evaluation.md)."""
    max_samples: int = 25_600
    """At most this many samples, evenly spread over the set."""
    views: int = 0
    """Views of a sample, augmented as in MoCo v2, for LiDAR and the alignment of views, which are left out with 0; the
    authors take 50."""
    view_samples: int = 1000
    """At most this many samples whose views are compared."""

    @classmethod
    def for_run(cls, config: "Config") -> Self:
        """Look at held-out samples where there are some, whose features other tasks want, too."""
        return cls(split="train" if config.eval.shards is None else "test")

    @property
    def needs_labels(self) -> bool:
        """No: features alone are looked at."""
        return False

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(1, max_samples=self.max_samples, view_samples=self.view_samples)
        if self.views:
            refuse_unless_above(1, views=self.views)
        check_layer(self.layer)

    def wants(self) -> tuple[Want, ...]:
        """Some samples of one set."""
        return (Want(split=self.split, layer=self.layer, at_most=self.max_samples),)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Effective rank, then what explains it."""
        of_views = {
            "lidar": FigureInfo(
                title="LiDAR",
                caption="Effective rank of what tells samples apart, measured by how far apart their views are.",
                unit="number",
            ),
            "view_alignment": FigureInfo(
                title="alignment of views",
                caption="Mean of |x - y|^2 over all pairs of views of the same sample, features of length 1.",
                unit="number",
                best="lowest",
            ),
        }
        return self._of_samples() | (of_views if self.views else {})

    def _of_samples(self) -> dict[str, FigureInfo]:
        return {
            "rankme": FigureInfo(
                title="RankMe",
                caption="Effective rank: exponential of the entropy of the features' normalized singular values.",
                unit="number",
            ),
            "uniformity": FigureInfo(
                title="uniformity",
                caption="Logarithm of the mean of exp(-2 |x - y|^2) over all pairs of samples, features of length 1.",
                unit="number",
                best="lowest",
            ),
            "alignment": FigureInfo(
                title="alignment of classes",
                caption="Mean of |x - y|^2 over all pairs of samples of the same class, features of length 1.",
                unit="number",
                best="lowest",
            ),
            "spread": FigureInfo(
                title="spread",
                caption="Deviation of the features' numbers, features of length 1: 1 if spread evenly, 0 if collapsed.",
                unit="number",
            ),
            "top_component": FigureInfo(
                title="variance of the first component",
                caption="Share of the features' variance along their first principal component.",
                best="lowest",
            ),
            "components_90": FigureInfo(
                title="components of 90% of the variance",
                caption="Principal components that have 90% of the features' variance together.",
                unit="number",
            ),
            "dead": FigureInfo(
                title="dead dimensions",
                caption="Share of the features' numbers that vary less than a thousandth of the mean number.",
                best="lowest",
            ),
            "norm": FigureInfo(
                title="norm", caption="Mean length of the features; larger is not better.", unit="number"
            ),
            "norm_variation": FigureInfo(
                title="variation of the norm",
                caption="Standard deviation of the features' lengths, divided by the mean length.",
                unit="number",
                best="lowest",
            ),
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Take the features apart."""
        from torch.nn.functional import normalize

        from moco_fast.evaluation.health import alignment, rankme, spectrum, spread, uniformity

        features = inputs.features(*self.wants(), labeled=False)
        if len(features) < 2:
            raise ValueError(f"health compares samples, but the {self.split} set holds {len(features)}: give more")
        values = features.values.to(inputs.device)
        found, unit, norms = spectrum(values), normalize(values), values.double().norm(dim=1)
        figures: dict[str, float | None] = {
            "rankme": rankme(found.singular),
            "uniformity": uniformity(unit),
            "alignment": alignment(unit, features.labels),
            "spread": spread(unit),
            "top_component": found.top_share,
            "components_90": found.components(0.9),
            "dead": found.dead_share,
            "norm": norms.mean().item(),
            "norm_variation": (norms.std(correction=0) / norms.mean()).item(),
        }
        if self.views:
            figures |= self._compare_views(inputs)
        return Outcome(
            figures={name: Measured(value=value) for name, value in figures.items() if value is not None},
            facts={"num_samples": len(features), "dim": values.shape[1]},
        )

    def _compare_views(self, inputs: Inputs) -> dict[str, float]:
        """Compute the features of augmented views, and compare those of a sample with those of others."""
        from torch.nn.functional import normalize

        from moco_fast.evaluation.health import lidar, view_alignment

        values = _features_of_views(inputs, self.split, self.layer, self.views, self.view_samples)
        return {"lidar": lidar(values), "view_alignment": view_alignment(normalize(values, dim=2))}


def _features_of_views(inputs: Inputs, split: str, layer: str, num_views: int, num_samples: int) -> "Tensor":
    """Return features (N, V, D) of augmented views of samples that are evenly spread over a set."""
    import torch

    from moco_fast.encoders.layers import layer_features
    from moco_fast.evaluation.features import eval_mode, evenly
    from pipelines.config import VIEWS, ViewSpec
    from pipelines.loader import open_loader, suited_to

    shards = inputs.set_of(split)
    samples = evenly(shards.num_samples, min(num_samples, shards.num_samples))
    views = (ViewSpec(size=inputs.size, recipe=VIEWS["moco-v2"].query),) * num_views
    data = replace(suited_to(inputs.data, shards), batch_size=max(1, inputs.data.batch_size // num_views))
    rows: list[Tensor] = []
    # This rank's alone: a task on features is measured by the first one.
    loader = open_loader(data, views, samples=samples, device=inputs.device, shards=shards, divided=False)
    with loader, eval_mode(inputs.encoder), torch.no_grad(), inputs.autocast():
        for batch in loader:
            of_views = [layer_features(inputs.encoder, view, [layer])[layer].float() for view in batch.views]
            rows.append(torch.stack(of_views, dim=1))
    return torch.cat(rows)
