"""Linear classifiers on every stage of a ResNet as a task: where in the network the classes become separable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moco_fast.evaluation.base import FigureInfo, Inputs, Outcome, Task, Want, refuse_unless_above
from moco_fast.evaluation.tasks.linear import Linear

__all__ = ["Stages"]


@dataclass(frozen=True, kw_only=True)
class Stages(Task):
    """Train a linear classifier on each stage of a ResNet, by the fast protocol of `linear`."""

    name: ClassVar[str] = "stages"
    classifies: ClassVar[bool] = True
    live: ClassVar[bool] = True

    at_most: int | None = None
    """Average each stage over the finest grid that gives at most so many numbers: 9216 is what published figures of
    every stage have (Goyal et al. 2019). Unset: over the whole picture."""
    stages: tuple[int, ...] = (1, 2, 3, 4, 5)
    """1 is the stem, 2 to 5 are the four stages."""
    epochs: int | None = None
    """Passes over the training set; unset: those of `linear`."""
    batch_size: int = 256
    """Samples in a step."""

    def validate(self) -> None:
        """Refuse stages that are none."""
        if not self.stages or not set(self.stages) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"--stages is {self.stages}, but a ResNet has the stages 1 to 5")
        refuse_unless_above(0, at_most=self.at_most, epochs=self.epochs, batch_size=self.batch_size)

    def wants(self) -> tuple[Want, ...]:
        """Each stage of both sets."""
        return tuple(want for stage in self.stages for want in self._linear(stage).wants())

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracy on each stage, the last first."""
        caption = "Share of test samples that a linear classifier on this stage classifies rightly."
        return {
            f"stage{stage}": FigureInfo(title=f"stage {stage} top-1", caption=caption)
            for stage in sorted(self.stages, reverse=True)
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Measure `linear` on one stage after the other."""
        outcomes = {stage: self._linear(stage).measure(inputs) for stage in self.stages}
        first = outcomes[self.stages[0]]
        return Outcome(
            figures={f"stage{stage}": outcome.figures["top1"] for stage, outcome in outcomes.items()},
            chosen={f"stage{stage}": outcome.chosen for stage, outcome in outcomes.items()},
            facts=first.facts,
        )

    def _linear(self, stage: int) -> Linear:
        layer = f"stage{stage}" if self.at_most is None else f"stage{stage}/{self.at_most}"
        task = Linear(protocol="fast", layer=(layer,), batch_size=self.batch_size, epochs=self.epochs)
        return task.settled(None)
