"""Tasks as evaluations that a run does at intervals, on features of the encoder as it is at that step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import Outcome, RunSets, Split, Task
from moco_fast.evaluation.inputs import LiveFeatures, Subject, TaskInputs, measure_on
from pipelines.config import DataConfig
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["TaskEvaluation", "measure", "open_evaluation"]


def measure(
    task: Task,
    encoder: Encoder,
    *,
    sets: Mapping[Split, ShardSet],
    size: int,
    crop: float,
    data: DataConfig,
    device: torch.device,
    world: World = World(),
) -> Outcome:
    """Measure a settled task once, with features that are computed now; collective: every rank gets the outcome.

    Args:
        task: what to measure.
        encoder: on `device`; its modes are left as they were.
        sets: training and test set, open.
        size: height and width of the images in pixels.
        crop: side of the central square that is used, as a share of the image's shorter side.
        data: batch size, backend and cache, and what is done about samples that cannot be read.
        device: where to compute.
        world: this process and how many take part.

    Raises:
        ValueError: shards without labels, with different classes, or features that are not finite.
    """
    subject = Subject(encoder=encoder, sets=sets, size=size, crop=crop, data=data, device=device, world=world)
    source = LiveFeatures(subject=subject)
    inputs = TaskInputs(subject=subject, source=source, world=world)
    if task.needs_labels and task.splits >= {"train", "test"}:
        inputs.refuse_other_classes()
    source.prepare(task.wants())
    return measure_on(task, inputs)


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """A task on the sets of a run; see moco_fast.evaluation.base.Evaluation."""

    task: Task
    sets: Mapping[Split, ShardSet]
    config: Config
    """Of the run."""

    def figures(self, encoder: Encoder, *, device: torch.device, world: World) -> dict[str, float]:
        """Measure; collective."""
        config = self.config
        outcome = measure(
            self.task,
            encoder,
            sets=self.sets,
            size=config.views.size,
            crop=config.eval.crop,
            data=config.data,
            device=device,
            world=world,
        )
        figures = {name: measured.value for name, measured in outcome.figures.items()}
        return {f"{self.task.name}/{name}": value for name, value in (figures | dict(outcome.facts)).items()}

    def line(self, figures: Mapping[str, float]) -> str:
        """Give the most important figure."""
        name, info = next(iter(self.task.figures().items()))
        value = figures[f"{self.task.name}/{name}"]
        return f"{info.title} {100 * value:.1f}%" if info.unit == "share" else f"{info.title} {value:.4g}"


def open_evaluation(task: Task, config: Config, sets: RunSets) -> TaskEvaluation:
    """Give a task the sets of a run. Raises ValueError: nothing tells the training labels."""
    if sets.training is None:
        raise ValueError(
            f"--eval.shards {config.eval.shards} is compared with the training samples, whose labels nothing tells: "
            f"`make-shards index {config.data.shards}` does, or leave out --eval.shards"
        )
    held_out: dict[Split, ShardSet] = {} if sets.held_out is None else {"test": sets.held_out}
    return TaskEvaluation(task=task, sets={"train": sets.training, **held_out}, config=config)
