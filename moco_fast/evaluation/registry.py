"""Evaluations that a run does at intervals, by name. A new one is a file and a line here."""

from collections.abc import Callable
from importlib import import_module

from moco_fast.config import Config
from moco_fast.evaluation.base import Evaluation

__all__ = ["EVALUATIONS", "open_evaluations"]

EVALUATIONS = {"knn": "moco_fast.evaluation.knn:open_knn"}
"""Name -> module:function, which takes a run's Config and gives an Evaluation, or None where it was not asked for."""


def open_evaluations(config: Config) -> list[Evaluation]:
    """Open what a run's configuration asks for. Raises ValueError: a set is absent or does not fit."""
    opened: list[Evaluation] = []
    for where in EVALUATIONS.values():
        module, _, attribute = where.partition(":")
        opener: Callable[[Config], Evaluation | None] = getattr(import_module(module), attribute)
        evaluation = opener(config)
        if evaluation is not None:
            opened.append(evaluation)
    return opened
