"""Logistic regression as a task: L-BFGS on frozen features, the penalty chosen on a part of the training set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want, refuse_unless_above

__all__ = ["Logistic"]


@dataclass(frozen=True, kw_only=True)
class Logistic(Task):
    """Fit a logistic regression to frozen features by L-BFGS (Ericsson et al. 2021, linear.py of ssl-transfer)."""

    name: ClassVar[str] = "logistic"
    classifies: ClassVar[bool] = True
    live: ClassVar[bool] = True

    layer: str = "backbone"
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md)."""
    num_c: int = 45
    """Values of C that are tried, from 1e-6 to 1e5, evenly spread over the exponents."""
    max_iter: int = 1000
    """Maximum number of iterations of L-BFGS."""
    share: float = 0.2
    """Share of the training set on which C is chosen; the regression is then fitted again to all of it."""

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, num_c=self.num_c, max_iter=self.max_iter, share=self.share)
        if not self.share < 1:
            raise ValueError(f"--share is {self.share}, but must be below 1: the rest is fitted")
        check_layer(self.layer)

    def wants(self) -> tuple[Want, ...]:
        """All of both sets."""
        return (Want(split="train", layer=self.layer), Want(split="test", layer=self.layer))

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracy, over samples and over classes."""
        return {
            "top1": FigureInfo(title="logistic top-1", caption="Share of test samples that are classified rightly."),
            "mean_per_class": FigureInfo(
                title="logistic mean per class", caption="Mean over the classes of the share classified rightly."
            ),
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Choose C, fit to all, test."""
        from moco_fast.evaluation.labels import mean_per_class
        from moco_fast.evaluation.regression import fit_chosen

        train, test = map(inputs.features, self.wants())
        num_classes = inputs.num_classes
        fit, c = fit_chosen(
            train.values,
            train.labels,
            num_classes=num_classes,
            num_c=self.num_c,
            max_iter=self.max_iter,
            share=self.share,
            seed=inputs.seed,
            device=inputs.device,
        )
        hits = fit.predict(test.values) == test.labels
        return Outcome(
            figures={
                "top1": Measured(value=hits.double().mean().item(), num_trials=len(test)),
                "mean_per_class": Measured(value=mean_per_class(hits, test.labels, num_classes=num_classes)),
            },
            chosen={"c": c},
            facts={"num_train": len(train), "num_test": len(test)},
        )
