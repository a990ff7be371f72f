"""Tasks by name, of `moco-fast eval` and of runs that evaluate at intervals. A new one is a file and a line here."""

from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING

from moco_fast.evaluation.base import Evaluation, RunSets, Score, Task

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["TASKS", "find_scores", "open_evaluations", "task_class"]

TASKS = {
    "knn": "moco_fast.evaluation.tasks.knn:Knn",
    "linear": "moco_fast.evaluation.tasks.linear:Linear",
    "logistic": "moco_fast.evaluation.tasks.logistic:Logistic",
    "svm": "moco_fast.evaluation.tasks.svm:Svm",
    "stages": "moco_fast.evaluation.tasks.stages:Stages",
    "health": "moco_fast.evaluation.tasks.health:Health",
}
"""Name -> module:class. The modules import torch only when they measure."""


def task_class(name: str) -> type[Task]:
    """Return the class of a task. Raises ValueError: there is no such task."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: choose {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def open_evaluations(config: "Config", sets: RunSets) -> list[Evaluation]:
    """Prepare what a run's configuration asks for. Raises ValueError: a set does not fit."""
    from moco_fast.evaluation.live import open_evaluation

    return [open_evaluation(task, config, sets) for task in _asked(config)]


def find_scores(config: "Config") -> tuple[Score, ...]:
    """Return how the report shows the figures of a run's evaluations, whose sets need not be there any more."""
    return tuple(
        Score(
            name=info.title,
            title=info.title,
            caption=info.caption,
            curves={f"{task.name}/{name}": ""},
            best=info.best,
            percent=info.unit == "share",
        )
        for task in _asked(config)
        for name, info in islice(task.figures().items(), 1)
    )


def _asked(config: "Config") -> list[Task]:
    return [task for name in TASKS if (task := task_class(name).for_run(config)) is not None]
