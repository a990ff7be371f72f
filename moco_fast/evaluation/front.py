"""Front of all tasks: features made once, tasks measured with every seed, results that say how to repeat them."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from moco_fast import distributed
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.base import Saving, Task
from moco_fast.evaluation.cache import FeatureCache, data_digest, default_folder
from moco_fast.evaluation.inputs import CachedFeatures, Subject, TaskInputs, measure_on
from moco_fast.evaluation.labels import may_have_labels
from moco_fast.evaluation.result import Result, average_curves, settings_of, summarize
from shards.ground.digests import digest
from shards.sets import ShardSet

__all__ = ["Plan", "evaluate", "why_not"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: an encoder on its sets, by tasks, with seeds."""

    subject: Subject
    name: str
    """Of the encoder, for people."""
    step: int | None = None
    """Optimizer steps after which a run had it."""
    tasks: Sequence[Task]
    """Settled ones."""
    seeds: int = 1
    """Measurements of every task that draws, with the seeds 0, 1 and so on."""
    cache: Path = field(default_factory=default_folder)
    cache_gib: float | None = None
    save_every_steps: int = 500
    """Steps after which a task that trains saves its state."""
    leave_out: Callable[[Task, str], None] | None = None
    """Takes each task that cannot be measured, and why; the others are measured. None: that is an error."""


def why_not(task: Task, inputs: TaskInputs) -> str | None:
    """Say why encoder or sets do not allow a settled task; None: they do."""
    subject = inputs.subject
    sets = subject.sets
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
    try:
        if task.needs_labels and task.splits >= {"train", "test"}:
            inputs.refuse_other_classes()
        shapes = layer_shapes(subject.encoder, [want.layer for want in task.wants()], size=subject.size)
    except ValueError as error:
        return str(error)
    if task.needs_labels and "train" in task.splits and (inputs.label_counts("train") > 0).sum() == 1:
        return f"{sets['train'].where} has samples of one class, so there is nothing to tell apart: give two at least"
    if places := [layer for layer, shape in shapes.items() if len(shape) > 1]:
        return f"--layer {places[0]} gives a vector for each place of an image, but images are compared by one vector"
    return task.why_not(inputs)


def evaluate(plan: Plan) -> list[Result]:
    """Measure every task; collective: every rank calls it and gets the results.

    The encoder runs over each set once, for the layers of all tasks together, and not at all for features that the
    cache has. Which rank does what does not show in the results.

    Raises:
        ValueError: a task does not fit the encoder or the sets, and `plan.leave_out` is not given.
        OSError: the cache's disk is full.
    """
    subject = plan.subject
    source = CachedFeatures(subject=subject, cache=FeatureCache(plan.cache, limit_gib=plan.cache_gib))
    inputs = TaskInputs(subject=subject, source=source, world=subject.world)
    possible: list[Task] = []
    for task in plan.tasks:
        if reason := why_not(task, inputs):
            if plan.leave_out is None:
                raise ValueError(f"{task.name} cannot be measured: {reason}")
            plan.leave_out(task, reason)
        else:
            possible.append(task)
    with distributed.leaving_together():
        source.prepare(want for task in possible for want in task.wants())
    results: list[Result] = []
    for task in possible:
        try:
            results.append(_measure(plan, task, source))
        except ValueError as error:
            if plan.leave_out is None:
                raise
            plan.leave_out(task, str(error))
    return results


def _measure(plan: Plan, task: Task, source: CachedFeatures) -> Result:
    subject = plan.subject
    begin = time.perf_counter()
    seeds = tuple(range(plan.seeds)) if task.draws else (0,)
    inputs = TaskInputs(subject=subject, source=source, world=subject.world, saving=_saving(plan))
    outcomes = [measure_on(task, replace(inputs, seed=seed)) for seed in seeds]
    chosen = tuple(dict(outcome.chosen) for outcome in outcomes)
    return Result(
        task=task.name,
        protocol=task.preset,
        settings=settings_of(task),
        encoder={"name": plan.name, "digest": subject.digest},
        step=plan.step,
        data={split: _describe(shards) for split, shards in subject.sets.items() if split in task.splits},
        view={"size": subject.size, "crop": subject.crop, "backend": subject.data.backend},
        precision=subject.precision,
        device=str(subject.device),
        world_size=subject.world.world_size,
        seeds=seeds,
        figures=summarize(task.figures(), outcomes),
        curves=average_curves(outcomes),
        chosen=chosen if any(chosen) else (),
        facts=dict(outcomes[0].facts),
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        versions=_versions(),
        time_s=round(time.perf_counter() - begin, 3),
    )


def _saving(plan: Plan) -> Saving:
    subject = plan.subject
    known = {
        "encoder": subject.digest,
        "data": {split: data_digest(shards) for split, shards in subject.sets.items() if split in ("train", "test")},
        "view": [subject.size, subject.crop, subject.data.backend],
        "precision": subject.precision,
    }
    return Saving(
        folder=plan.cache / "trainings",
        every_steps=plan.save_every_steps,
        subject=digest(json.dumps(known, sort_keys=True).encode()),
    )


def _describe(shards: ShardSet) -> dict[str, Any]:
    return {
        "where": shards.where,
        "digest": data_digest(shards),
        "num_samples": shards.num_samples,
        "num_classes": len(shards.class_names),
    }


def _versions() -> dict[str, str]:
    names = ("moco-fast", "torch", "timm", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
