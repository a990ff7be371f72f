"""kNN as a task: the vote of the nearest training samples, with several numbers of neighbors at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Self

from moco_fast.config import EvalConfig
from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want, refuse_unless_above

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["Knn"]

_PUBLISHED = (200, 10, 20, 100)


@dataclass(frozen=True, kw_only=True)
class Knn(Task):
    """Classify test samples by a vote of their nearest training samples; nothing is trained."""

    name: ClassVar[str] = "knn"
    classifies: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    live: ClassVar[bool] = True

    k: tuple[int, ...] | None = None
    """Neighbors that vote; of several, the first gives the figure, the others stand beside it. Unset: the run's
    --eval.k, or 200, and 10, 20 and 100."""
    temperature: tuple[float, ...] | None = None
    """Temperature of the vote's weights, or several, the first for the figure. Unset: the run's --eval.temperature, or
    0.07."""
    layer: str | None = None
    """What neighbors are compared by: backbone, head, or another layer (docs/evaluation.md). Unset: the run's
    --eval.layer, or backbone."""
    max_bank: int | None = None
    """At most this many training samples serve as neighbors, evenly spread over the set. Unset: the run's
    --eval.max-bank; all, if the encoder is not that of a run."""

    @property
    def shared(self) -> bool:
        """Every rank classifies its share of the queries."""
        return True

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Take what is open from the run."""
        del is_transformer
        of_run = EvalConfig() if run is None else run.eval
        first = _PUBLISHED if run is None else tuple(dict.fromkeys((run.eval.k, *_PUBLISHED)))
        return replace(
            self,
            k=first if self.k is None else self.k,
            temperature=(of_run.temperature,) if self.temperature is None else self.temperature,
            layer=of_run.layer if self.layer is None else self.layer,
            max_bank=self.max_bank if self.max_bank is not None or run is None else run.eval.max_bank,
        )

    @classmethod
    def for_run(cls, config: "Config") -> Self:
        """Vote once, with the run's own settings."""
        return cls(k=(config.eval.k,)).settled(config)

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, k=self.k, temperature=self.temperature, max_bank=self.max_bank)
        if self.layer is not None:
            check_layer(self.layer)

    def wants(self) -> tuple[Want, ...]:
        """Neighbors and queries."""
        layer = self.layer or "backbone"
        return (
            Want(split="train", layer=layer, at_most=self.max_bank, unit=True),
            Want(split="test", layer=layer, unit=True),
        )

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracy, and the same of every other setting."""
        caption = "Share of test samples whose {k} nearest training samples vote for the right class."
        settings = self._settings()
        first = f"kNN top-1, {self._words(settings[0])}" if settings[1:] else "kNN top-1"
        infos = {
            "top1": FigureInfo(title=first, caption=caption.format(k=settings[0][0])),
            "mean_per_class": FigureInfo(
                title="kNN mean per class", caption="Mean over the classes of the share that is classified rightly."
            ),
        }
        for setting in settings[1:]:
            title = f"kNN top-1, {self._words(setting)}"
            infos[self._figure(setting)] = FigureInfo(title=title, caption=caption.format(k=setting[0]))
        return infos

    def measure(self, inputs: Inputs) -> Outcome:
        """Let neighbors vote on this rank's share of the queries."""
        import torch
        import torch.distributed as dist

        from moco_fast import distributed
        from moco_fast.evaluation.knn import predict
        from moco_fast.interrupt import may_be_interrupted

        bank, queries = map(inputs.features, self.wants())
        first, *others = self._settings()
        of_first = (min(first[0], len(bank)), first[1])
        # What a first one of fewer neighbors is measured by may be asked for beside it.
        asked = {first: of_first} | {setting: setting for setting in others if setting[0] <= len(bank)}
        num_classes, world = inputs.num_classes, inputs.world
        mine = slice(*(len(queries) * rank // world.world_size for rank in (world.rank, world.rank + 1)))
        labels = queries.labels[mine].to(inputs.device)
        with may_be_interrupted():
            predictions = predict(
                bank.values,
                bank.labels.to(inputs.device),
                queries.values[mine],
                num_classes=num_classes,
                settings=list(asked.values()),
            )
        right = torch.stack(
            [labels[predictions[how] == labels].bincount(minlength=num_classes) for how in asked.values()]
        )
        if world.world_size > 1:
            distributed.leave_together()
            dist.all_reduce(right)
        total = queries.labels.bincount(minlength=num_classes)
        figures: dict[str, Measured] = {}
        for setting, of_class in zip(asked, right.cpu(), strict=True):
            top1 = of_class.sum().item() / len(queries)
            figures[self._figure(setting)] = Measured(value=top1, num_trials=len(queries))
        there = total > 0
        of_classes = right[0].cpu()[there].double() / total[there]
        figures["mean_per_class"] = Measured(value=of_classes.mean().item())
        note = f"k = {first[0]} neighbors were asked for, but the bank holds {len(bank)}: all of them vote"
        return Outcome(
            figures=figures,
            facts={"num_bank": len(bank), "num_queries": len(queries)},
            notes=(note,) if first[0] > len(bank) else (),
        )

    def _settings(self) -> list[tuple[int, float]]:
        assert self.k is not None
        assert self.temperature is not None
        return list(dict.fromkeys(product(self.k, self.temperature)))

    def _figure(self, setting: tuple[int, float]) -> str:
        """Name the figure of (k, temperature)."""
        settings = self._settings()
        if setting == settings[0]:
            return "top1"
        temperature = f"_t{setting[1]:g}" if setting[1] != settings[0][1] else ""
        return f"top1_k{setting[0]}{temperature}"

    def _words(self, setting: tuple[int, float]) -> str:
        k, temperature = setting
        return f"k = {k}" if temperature == self._settings()[0][1] else f"k = {k}, T = {temperature:g}"
