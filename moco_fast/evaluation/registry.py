"""Tasks by name, of `moco-fast eval` and of runs that evaluate at intervals. A new one is a file and a line here."""

from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING

from moco_fast.evaluation.base import Evaluation, RunSets, Score, Task

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["TASKS", "check_tasks", "find_scores", "open_evaluation", "task_class"]

TASKS = {
    "knn": "moco_fast.evaluation.tasks.knn:Knn",
    "linear": "moco_fast.evaluation.tasks.linear:Linear",
    "logistic": "moco_fast.evaluation.tasks.logistic:Logistic",
    "svm": "moco_fast.evaluation.tasks.svm:Svm",
    "stages": "moco_fast.evaluation.tasks.stages:Stages",
    "few-shot": "moco_fast.evaluation.tasks.few_shot:FewShot",
    "retrieval": "moco_fast.evaluation.tasks.retrieval:Retrieval",
    "cluster": "moco_fast.evaluation.tasks.cluster:Cluster",
    "domains": "moco_fast.evaluation.tasks.domains:Domains",
    "finetune": "moco_fast.evaluation.tasks.finetune:Finetune",
    "label-noise": "moco_fast.evaluation.tasks.label_noise:LabelNoise",
    "health": "moco_fast.evaluation.tasks.health:Health",
    "robustness": "moco_fast.evaluation.tasks.robustness:Robustness",
}
"""Name -> module:class. The modules import torch only when they measure."""
_PROBE = Score(
    name="online probe top-1",
    title="Online probe",
    caption="Share of held-out samples that a linear classifier names, trained beside the run on detached features.",
    curves={"probe/held_out_top1": ""},
    best="highest",
    percent=True,
)
_WITH_LABELS, _WITHOUT_LABELS = "knn", "health"  # what a run measures unless --eval.tasks says otherwise


def task_class(name: str) -> type[Task]:
    """Return the class of a task. Raises ValueError: there is no such task."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: choose {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def check_tasks(config: "Config") -> None:
    """Refuse tasks that a run cannot measure at intervals, as far as the configuration tells. Raises ValueError."""
    for task in _asked(config):
        if config.eval.shards is None and "test" in task.splits:
            raise ValueError(f"--eval.tasks {task.name} measures held-out samples: name some with --eval.shards")
        if config.data.stream_samples is not None and "train" in task.splits:
            raise ValueError(
                f"--eval.shards {config.eval.shards} is measured by {task.name}, which needs the numbers of the "
                f"training samples, but streamed samples have none: `make-shards index {config.data.shards}` numbers "
                "them; --eval.tasks health needs none where there are held-out shards"
            )


def open_evaluation(config: "Config", sets: RunSets) -> Evaluation | None:
    """Prepare what a run's configuration asks for; None: nothing.

    Without labels only what needs none is measured, and the evaluation's `notes` say so.

    Raises:
        ValueError: a set does not fit.
    """
    tasks = _asked(config)
    if config.eval.online_probe:
        from moco_fast.evaluation.labels import may_have_labels
        from moco_fast.evaluation.online import HeldOutProbe

        if sets.training is None or not may_have_labels(sets.training):
            raise ValueError(
                f"--eval.online-probe learns from the labels of training samples, but nothing tells those of "
                f"{config.data.shards}: leave it out, or pack them with labels"
            )
        tasks += [HeldOutProbe()] if tasks and sets.held_out is not None else []
    if not tasks:
        return None
    from moco_fast.evaluation.live import open_tasks

    return open_tasks(tasks, config, sets, without_labels=_without_labels(config))


def find_scores(config: "Config") -> tuple[Score, ...]:
    """Return how the report shows the figures of a run's evaluations, whose sets need not be there any more.

    Of tasks that need no labels, which watch the encoder's health, all figures have a chart; of others the first.
    """
    tasks = {task.name: task for task in (*_asked(config), _without_labels(config))}
    scores = [
        Score(
            name=info.title,
            title=info.title,
            caption=info.caption,
            curves={f"{task.name}/{name}": ""},
            best=info.best,
            percent=info.unit == "share",
            about="learning" if task.needs_labels else "health",
            is_headline=number == 0,
        )
        for task in tasks.values()
        for number, (name, info) in enumerate(islice(task.figures().items(), 1 if task.needs_labels else None))
    ]
    return (*scores, *((_PROBE,) if config.eval.online_probe else ()))


def _asked(config: "Config") -> list[Task]:
    names = config.eval.tasks or (() if config.eval.shards is None else (_WITH_LABELS,))
    there = {"train": config.data.stream_samples is None, "test": config.eval.shards is not None}
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        task = task_class(name)
        if not task.live:
            known = [name for name in TASKS if task_class(name).live]
            raise ValueError(
                f"--eval.tasks {name} cannot be measured while a run goes on: choose among {', '.join(known)}, and use "
                f"`moco-fast eval {name}` afterwards"
            )
        tasks.append(task.for_run(config).with_sets([split for split, is_there in there.items() if is_there]))
    return tasks


def _without_labels(config: "Config") -> Task:
    return task_class(_WITHOUT_LABELS).for_run(config)
