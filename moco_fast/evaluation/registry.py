"""Registry of the evaluations that a run does at intervals. A new one is a class in a file and a line here."""

from importlib import import_module

from moco_fast.config import Config
from moco_fast.evaluation.base import Evaluation, RunSets, Score

__all__ = ["EVALUATIONS", "find_scores", "open_evaluations"]

EVALUATIONS = {"knn": "moco_fast.evaluation.knn:KnnEvaluation"}
"""Name -> module:class, an Evaluation."""


def open_evaluations(config: Config, sets: RunSets) -> list[Evaluation]:
    """Prepare what a run's configuration asks for. Raises ValueError: a set does not fit."""
    opened = (kind.open(config, sets) for kind in _kinds())
    return [evaluation for evaluation in opened if evaluation is not None]


def find_scores(config: Config) -> tuple[Score, ...]:
    """Return how the report shows the figures of a run's evaluations, whether they were asked for or not."""
    return tuple(score for kind in _kinds() for score in kind.scores(config))


def _kinds() -> list[type[Evaluation]]:
    places = (where.partition(":") for where in EVALUATIONS.values())
    return [getattr(import_module(module), name) for module, _, name in places]
