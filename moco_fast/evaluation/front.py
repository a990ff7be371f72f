"""Front of all tasks: features made once, tasks measured with every seed, results that say how to repeat them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moco_fast import distributed
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.base import Saving, Task
from moco_fast.evaluation.cache import FeatureCache, default_folder
from moco_fast.evaluation.inputs import CachedFeatures, Subject, TaskInputs, measure_on
from moco_fast.evaluation.kept import KeptResults
from moco_fast.evaluation.known import notes_on, why_sets_do_not_allow
from moco_fast.evaluation.result import Result, average_curves, settings_of, summarize
from moco_fast.versions import versions_of
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
    kept: KeptResults = field(default_factory=KeptResults)
    """Results of an earlier start of the same command, and where those of this one are kept."""


def why_not(task: Task, inputs: TaskInputs) -> str | None:
    """Say why encoder or sets do not allow a settled task; None: they do."""
    subject = inputs.subject
    if reason := why_sets_do_not_allow(task, inputs.for_task(task)):
        return reason
    try:
        shapes = layer_shapes(subject.encoder, [want.layer for want in task.wants()], size=subject.size)
    except ValueError as error:
        return str(error)
    if places := [layer for layer, shape in shapes.items() if len(shape) > 1]:
        return f"--layer {places[0]} gives a vector for each place of an image, but images are compared by one vector"
    return None


def evaluate(plan: Plan) -> list[Result]:
    """Measure every task; collective: every rank calls it and gets the results.

    The encoder runs over each set once, for the layers of all tasks together, and not at all for features that the
    cache has. Which rank does what does not show in the results.

    Raises:
        ValueError: a task does not fit the encoder or the sets, and `plan.leave_out` is not given; or the encoder's
            weights are not finite.
        OSError: the cache's disk is full.
    """
    subject = plan.subject
    if not all(bool(value.isfinite().all()) for value in subject.encoder.state_dict().values()):
        raise ValueError(
            f"the weights of {plan.name} are not finite: it has diverged, so evaluate an earlier checkpoint"
        )
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
    asked = [(task, _asked(plan, task)) for task in possible]
    found = {number: each for number, (_, result) in enumerate(asked) if (each := plan.kept.earlier(result))}
    with distributed.leaving_together():
        source.prepare(want for number, task in enumerate(possible) if number not in found for want in task.wants())
    results: list[Result] = []
    for number, (task, result) in enumerate(asked):
        try:
            results.append(found.get(number) or _measure(plan, task, result, source))
        except ValueError as error:
            if plan.leave_out is None:
                raise
            plan.leave_out(task, str(error))
        else:
            plan.kept.add(results[-1])
    return results


def _asked(plan: Plan, task: Task) -> Result:
    """Return the result of a task without what is measured."""
    subject = plan.subject
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
        seeds=tuple(range(plan.seeds)) if task.draws else (0,),
        figures={},
        versions=versions_of("torch", "timm", "numpy", "scikit-learn"),
    )


def _measure(plan: Plan, task: Task, asked: Result, source: CachedFeatures) -> Result:
    begin = time.perf_counter()
    inputs = TaskInputs(subject=plan.subject, source=source, world=plan.subject.world, saving=_saving(plan))
    outcomes = [measure_on(task, replace(inputs, seed=seed)) for seed in asked.seeds]
    chosen = tuple(dict(outcome.chosen) for outcome in outcomes)
    notes = (*notes_on(task, inputs.for_task(task)), *(note for outcome in outcomes for note in outcome.notes))
    return replace(
        asked,
        figures=summarize(task.figures(), outcomes),
        curves=average_curves(outcomes),
        chosen=chosen if any(chosen) else (),
        facts=dict(outcomes[0].facts),
        notes=tuple(dict.fromkeys(notes)),
        time_s=round(time.perf_counter() - begin, 3),
    )


def _saving(plan: Plan) -> Saving:
    subject = plan.subject
    known = {
        "encoder": subject.digest,
        "data": {split: subject.sets[split].manifest.identity for split in ("train", "test") if split in subject.sets},
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
        "digest": shards.manifest.identity,
        "num_samples": shards.num_samples,
        "num_classes": len(shards.class_names),
    }
