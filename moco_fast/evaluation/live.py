"""Tasks as the evaluation that a run does at intervals, on features of the encoder as it is at that step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import FigureInfo, Outcome, RunSets, Split, Task
from moco_fast.evaluation.front import why_not
from moco_fast.evaluation.inputs import LiveFeatures, Subject, TaskInputs, measure_on
from moco_fast.evaluation.known import OpenSets, notes_on, why_sets_do_not_allow
from moco_fast.evaluation.labels import count_labels_together, may_have_labels
from moco_fast.evaluation.online import HeldOutProbe
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["RunEvaluation", "measure", "open_tasks"]


def measure(tasks: Sequence[Task], subject: Subject, *, at_most: Mapping[Split, int]) -> list[Outcome]:
    """Measure settled tasks once, with features that are computed now; collective: every rank gets the outcomes.

    The encoder runs over each set once, for all tasks together.

    Args:
        tasks: what to measure.
        subject: the encoder and the sets.
        at_most: bounds the samples of a set that are looked at.

    Raises:
        ValueError: encoder or sets do not allow a task, or features are not finite.
    """
    source = LiveFeatures(subject=subject, at_most=at_most)
    inputs = TaskInputs(subject=subject, source=source, world=subject.world, at_most=at_most)
    for task in tasks:
        if reason := why_not(task, inputs):
            raise ValueError(f"{task.name} cannot be measured: {reason}")
    source.prepare(want for task in tasks for want in task.wants())
    return [measure_on(task, inputs) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class RunEvaluation:
    """Tasks on the sets of a run; see moco_fast.evaluation.base.Evaluation."""

    tasks: tuple[Task, ...]
    sets: Mapping[Split, ShardSet]
    config: Config
    """Of the run."""
    notes: tuple[str, ...] = ()

    @property
    def infos(self) -> Mapping[str, FigureInfo]:
        """All tasks' figures."""
        return {f"{task.name}/{name}": info for task in self.tasks for name, info in task.figures().items()}

    def figures(
        self, encoder: Encoder, *, device: torch.device, world: World, probe: nn.Module | None = None
    ) -> dict[str, float]:
        """Measure; collective."""
        config = self.config
        tasks = [replace(task, probe=probe) if isinstance(task, HeldOutProbe) else task for task in self.tasks]
        subject = Subject(
            encoder=encoder,
            sets=self.sets,
            size=config.views.size,
            crop=config.eval.crop,
            data=config.data,
            device=device,
            world=world,
        )
        found: dict[str, float] = {}
        for task, outcome in zip(tasks, measure(tasks, subject, at_most=_bounds(config)), strict=True):
            figures = {name: measured.value for name, measured in outcome.figures.items()}
            found |= {f"{task.name}/{name}": value for name, value in (figures | dict(outcome.facts)).items()}
        return found

    def line(self, figures: Mapping[str, float]) -> str:
        """Give the first figure of each task that these samples have, as few-shot may lack its first."""
        words: list[str] = []
        for task in self.tasks:
            name, info = next(item for item in task.figures().items() if f"{task.name}/{item[0]}" in figures)
            value = figures[f"{task.name}/{name}"]
            words.append(f"{info.title} {100 * value:.1f}%" if info.unit == "share" else f"{info.title} {value:.4g}")
        return ", ".join(words)


def open_tasks(tasks: Sequence[Task], config: Config, sets: RunSets, *, without_labels: Task) -> RunEvaluation:
    """Give tasks the sets of a run.

    Args:
        tasks: what the run asks for.
        config: of the run.
        sets: of the run.
        without_labels: what is measured if no task can be, for lack of labels.

    Raises:
        ValueError: nothing tells the training samples, or sets do not allow a task.
    """
    opened: dict[Split, ShardSet] = {}
    if sets.training is not None:
        opened["train"] = sets.training
    if sets.held_out is not None:
        opened["test"] = sets.held_out
    unlabeled = {split: shards.where for split, shards in opened.items() if not may_have_labels(shards)}
    left_out = [task for task in tasks if task.needs_labels and task.splits & unlabeled.keys()]
    possible = [task for task in tasks if task not in left_out] or [without_labels]
    needed = frozenset[Split]().union(*(task.splits for task in possible))
    if "train" in needed and sets.training is None:
        raise ValueError(
            f"--eval.shards {config.eval.shards} is compared with the training samples, whose labels nothing tells: "
            f"`make-shards index {config.data.shards}` does, or leave out --eval.shards"
        )
    kept: dict[Split, ShardSet] = {split: shards for split, shards in opened.items() if split in needed}
    known = OpenSets(opened=kept, at_most=_bounds(config))
    for split, shards in kept.items():
        if any(task.needs_labels for task in possible):
            count_labels_together(shards, known.at_most.get(split))
    for task in possible:
        if reason := why_sets_do_not_allow(task, known):
            raise ValueError(f"--eval.tasks {task.name} cannot be measured: {reason}")
    about_sets = dict.fromkeys(f"evaluation: {note}" for task in possible for note in notes_on(task, known))
    notes = (*((_about(left_out, possible, unlabeled),) if left_out else ()), *about_sets)
    return RunEvaluation(tasks=tuple(possible), sets=kept, config=config, notes=notes)


def _bounds(config: Config) -> dict[Split, int]:
    return {"train": config.eval.max_bank, "test": config.eval.max_held_out}


def _about(left_out: Sequence[Task], measured: Sequence[Task], unlabeled: Mapping[Split, str]) -> str:
    where = " and ".join(dict.fromkeys(where for split, where in unlabeled.items() if _looks_at(left_out, split)))
    names = [" and ".join(task.name for task in tasks) for tasks in (left_out, measured)]
    return f"evaluation: {where} holds no labels, so {names[1]} is measured, not {names[0]}"


def _looks_at(tasks: Sequence[Task], split: Split) -> bool:
    return any(split in task.splits for task in tasks)
