"""Linear support vector machines, one for each class against the rest, and how well their scores rank."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["average_precision", "fit_all", "fit_few", "mean_average_precision", "scores_of"]

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Machines = Mapping[int, Any]
"""Class -> fitted sklearn.svm.LinearSVC."""

_FOLDS = 3
_MAX_DECIDING = 5000  # samples on which the cost of a low-shot machine is chosen


def average_precision(scores: npt.NDArray[np.floating[Any]], is_positive: npt.NDArray[np.bool_]) -> float:
    """Return the area under the precision-recall curve, precision made falling first (VOC's since 2010).

    That of svm_helper.calculate_ap; samples of equal score count in the order in which they stand.
    """
    hits = is_positive[np.argsort(-scores, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best_from_here[hits].mean()) if hits.any() else float("nan")


def mean_average_precision(scores: npt.NDArray[np.floating[Any]], labels: Labels) -> float:
    """Return the mean over the classes that are there of the average precision of their column: (N, C), (N,)."""
    return float(np.mean([average_precision(scores[:, label], labels == label) for label in np.unique(labels)]))


def fit_all(
    values: Values, labels: Labels, *, costs: Sequence[float], seed: int
) -> tuple[dict[int, Any], dict[str, float]]:
    """Fit a machine for each class, each with the cost that is best in threefold cross-validation.

    Args:
        values: (N, D) features of length 1.
        labels: (N,)
        costs: that are tried; of several that are as good, the first.
        seed: of scikit-learn's solver.

    Returns:
        the machines, and the chosen costs by the number of the class.
    """
    machines: dict[int, Any] = {}
    chosen: dict[str, float] = {}
    for label in np.unique(labels).tolist():
        is_positive = labels == label
        cost = _choose_cost(values, is_positive, costs, seed) if len(costs) > 1 else costs[0]
        machines[label], chosen[str(label)] = _fit(values, is_positive, cost, seed), cost
    return machines, chosen


def fit_few(
    values: Values, labels: Labels, *, shots: int, costs: Sequence[float], seed: tuple[int, ...]
) -> dict[int, Any] | None:
    """Fit machines to `shots` samples of each class; their costs are chosen on training samples that were not drawn.

    Returns:
        the machines; None where a class has no more than `shots` samples.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels).tolist()
    if min(np.count_nonzero(labels == label) for label in classes) <= shots:
        return None
    drawn = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:shots] for label in classes])
    rest = rng.permutation(np.setdiff1d(np.arange(len(labels)), drawn))[:_MAX_DECIDING]
    machines: dict[int, Any] = {}
    for label in classes:
        tried = [_fit(values[drawn], labels[drawn] == label, cost, seed[0]) for cost in costs]
        is_positive = labels[rest] == label
        machines[label] = max(
            tried, key=lambda machine: average_precision(machine.decision_function(values[rest]), is_positive)
        )
    return machines


def scores_of(machines: Machines, values: Values, *, num_classes: int) -> npt.NDArray[np.float64]:
    """Return (N, C) scores; a class without a machine has none above minus infinity."""
    scores = np.full((len(values), num_classes), -np.inf)
    for label, machine in machines.items():
        scores[:, label] = machine.decision_function(values)
    return scores


def _choose_cost(values: Values, is_positive: npt.NDArray[np.bool_], costs: Sequence[float], seed: int) -> float:
    from sklearn.model_selection import StratifiedKFold

    if min(is_positive.sum(), (~is_positive).sum()) < _FOLDS:
        return costs[len(costs) // 2]  # too few for a choice
    folds = list(StratifiedKFold(_FOLDS).split(values, is_positive))

    def precision(cost: float) -> float:
        machines = [_fit(values[fits], is_positive[fits], cost, seed) for fits, _ in folds]
        found = zip(machines, folds, strict=True)
        return float(
            np.mean(
                [
                    average_precision(each.decision_function(values[held]), is_positive[held])
                    for each, (_, held) in found
                ]
            )
        )

    return max(costs, key=precision)


def _fit(values: Values, is_positive: npt.NDArray[np.bool_], cost: float, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    dual: Any = True  # declared as a text alone
    machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=dual, tol=1e-4, max_iter=2000, random_state=seed)
    with warnings.catch_warnings():
        # Published machines stop after these iterations too.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return machine.fit(values, np.where(is_positive, 1, -1))
