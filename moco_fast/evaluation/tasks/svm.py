"""Linear support vector machines as a task, one for each class, from all training samples or a few of each class.

As for VOC07 (Goyal et al. 2019; tools/svm of facebookresearch/fair_self_supervision_benchmark): features of length 1,
positives weighted twice, squared hinge, cost chosen for each class by threefold cross-validation of the average
precision. Samples may have one class or, as VOC's images, several; an object that VOC marks as difficult counts neither
as hit nor as miss in the test, and as absent in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want, refuse_unless_above

if TYPE_CHECKING:
    from moco_fast.config import Config
    from moco_fast.evaluation.svm import Targets, Values

__all__ = ["Svm"]

# svm_helper.parse_cost_list with the default of its scripts.
_PUBLISHED_COSTS = (0.01, 0.1, *(0.5**power for power in range(4, 20)))


@dataclass(frozen=True, kw_only=True)
class Svm(Task):
    """Train a linear support vector machine for each class on frozen features, as for VOC07 (Goyal et al. 2019)."""

    name: ClassVar[str] = "svm"
    classifies: ClassVar[bool] = True
    takes_label_sets: ClassVar[bool] = True
    live: ClassVar[bool] = True

    protocol: Literal["fast", "voc07"] = "fast"
    """`voc07`: the published costs on all training samples, and 1 to 96 samples of each class. `fast`: four costs on
    5,000 samples, and no low-shot."""
    layer: str = "backbone"
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md)."""
    costs: tuple[float, ...] | None = None
    """Costs of a mistake that are tried; unset: the protocol's."""
    max_train: int | None = None
    """At most this many training samples, evenly spread over the set; unset: 5,000 (fast), all (voc07)."""
    shots: tuple[int, ...] | None = None
    """Low-shot: numbers of training samples of each class. Unset: none (fast), 1 to 96 (voc07)."""
    num_draws: int = 5
    """Low-shot: independent draws, whose mean is the figure."""

    @property
    def preset(self) -> str:
        """The protocol."""
        return self.protocol

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Take what is open from the protocol."""
        del run, is_transformer
        is_fast = self.protocol == "fast"
        return replace(
            self,
            costs=((0.001, 0.01, 0.1, 1.0) if is_fast else _PUBLISHED_COSTS) if self.costs is None else self.costs,
            max_train=5000 if self.max_train is None and is_fast else self.max_train,
            shots=self.shots if self.shots is not None else () if is_fast else (1, 2, 4, 8, 16, 32, 64, 96),
        )

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, costs=self.costs, max_train=self.max_train, num_draws=self.num_draws)
        if self.shots:
            refuse_unless_above(0, shots=self.shots)
        check_layer(self.layer)

    def wants(self) -> tuple[Want, ...]:
        """Training samples and all test samples."""
        return (
            Want(split="train", layer=self.layer, at_most=self.max_train, unit=True),
            Want(split="test", layer=self.layer, unit=True),
        )

    def figures(self) -> Mapping[str, FigureInfo]:
        """Mean average precision, with all samples and with a few."""
        caption = "Mean over the classes of the average precision with which a machine ranks the test samples{}."
        infos = {
            "map": FigureInfo(title="SVM mAP", caption=caption.format("")),
            "top1": FigureInfo(
                title="SVM top-1",
                caption="Share of test samples whose class scores highest, if they have one each. Costs are chosen for "
                "each class alone, so scores of classes compare badly: `linear` measures accuracy.",
            ),
        }
        for shots in self.shots or ():
            words = f", trained with {shots} samples of each class"
            infos[f"map_{shots}_shot"] = FigureInfo(title=f"SVM mAP, {shots}-shot", caption=caption.format(words))
        return infos

    def measure(self, inputs: Inputs) -> Outcome:
        """Choose costs, train on all, test; then with a few samples of each class."""
        import numpy as np

        from moco_fast.evaluation.svm import fit_all, fit_few, mean_average_precision, scores_of

        assert self.costs is not None
        (values, targets), (test_values, test_targets) = (_samples(inputs, want) for want in self.wants())
        num_classes = inputs.num_classes
        machines, costs = fit_all(values, targets, costs=self.costs, seed=inputs.seed)
        scores = scores_of(machines, test_values, num_classes=num_classes)
        figures = {"map": Measured(value=mean_average_precision(scores, test_targets))}
        if inputs.label_sets("test") is None:
            right = test_targets[np.arange(len(scores)), scores.argmax(axis=1)] == 1
            figures["top1"] = Measured(value=float(right.mean()), num_trials=len(right))
        notes: list[str] = []
        for shots in self.shots or ():
            found: list[float] = []
            for draw in range(self.num_draws):
                few = fit_few(values, targets, shots=shots, costs=self.costs, seed=(inputs.seed, shots, draw))
                if few is not None:
                    few_scores = scores_of(few, test_values, num_classes=num_classes)
                    found.append(mean_average_precision(few_scores, test_targets))
            if found:
                figures[f"map_{shots}_shot"] = Measured(value=sum(found) / len(found))
            else:
                notes.append(f"{shots}-shot is left out: some class has fewer than {shots} training samples")
        return Outcome(
            figures=figures,
            chosen={"costs": costs},
            facts={"num_train": len(values), "num_test": len(test_values)},
            notes=tuple(notes),
        )


def _samples(inputs: Inputs, want: Want) -> "tuple[Values, Targets]":
    """Return features and targets of the samples whose classes are known."""
    from moco_fast.evaluation.svm import one_hot

    sets = inputs.label_sets(want.split)
    features = inputs.features(want, labeled=sets is None)
    values = features.values.cpu().double().numpy()
    if sets is None:
        return values, one_hot(features.labels.numpy(), num_classes=inputs.num_classes)
    targets = sets[features.index.numpy()]
    known = (targets != -1).any(axis=1)
    return values[known], targets[known]
