"""Linear support vector machines, one for each class against the rest, and how well their scores rank."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["average_precision", "fit_all", "fit_few", "mean_average_precision", "one_hot", "scores_of"]

Values = npt.NDArray[np.float64]
Targets = npt.NDArray[np.int8]
"""(N, C): 1 for a class that a sample has, 0 for one that it has not, -1 for one that is not to be counted."""
Rows = npt.NDArray[np.int64]
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


def mean_average_precision(scores: npt.NDArray[np.floating[Any]], targets: Targets) -> float:
    """Return the mean, over the classes that are there, of the average precision of their column.

    Args:
        scores: (N, C)
        targets: (N, C); a sample of -1 does not count for that class, as VOC's difficult objects.
    """
    return float(np.nanmean([_precision_of(scores[:, c], targets[:, c]) for c in _classes(targets)]))


def one_hot(labels: npt.NDArray[np.int64], *, num_classes: int) -> Targets:
    """Return (N,) labels as (N, C) targets."""
    return (labels[:, None] == np.arange(num_classes)).astype(np.int8)


def fit_all(
    values: Values, targets: Targets, *, costs: Sequence[float], seed: int
) -> tuple[dict[int, Any], dict[str, float]]:
    """Fit a machine for each class, each with the cost that is best in threefold cross-validation.

    A target of -1 is a negative here, as in train_svm_kfold.py; only tests leave it out.

    Args:
        values: (N, D) features of length 1.
        targets: (N, C)
        costs: that are tried; of several that are as good, the first.
        seed: of scikit-learn's solver.

    Returns:
        the machines, and the chosen costs by the number of the class.
    """
    machines: dict[int, Any] = {}
    chosen: dict[str, float] = {}
    for label in _classes(targets):
        is_positive = targets[:, label] == 1
        cost = _choose_cost(values, is_positive, costs, seed) if len(costs) > 1 else costs[0]
        machines[label], chosen[str(label)] = _fit(values, is_positive, cost, seed), cost
    return machines, chosen


def fit_few(
    values: Values, targets: Targets, *, shots: int, costs: Sequence[float], seed: tuple[int, ...]
) -> dict[int, Any] | None:
    """Fit machines to `shots` samples of each class and as many of every other class.

    As published, one cost is chosen for all classes, by the mean of their average precision; but on training samples
    that were not drawn, where the published one is the best on the test set.

    Returns:
        the machines; None where a class has fewer than `shots` samples.
    """
    classes = _classes(targets)
    if min(np.count_nonzero(targets[:, label] == 1) for label in classes) < shots:
        return None
    drawn = _draw(targets, classes, shots, np.random.default_rng(seed))
    machines: list[dict[int, Any]] = []
    found: list[float] = []
    for cost in costs:
        fitted = {
            label: _fit(values[rows], targets[rows, label] == 1, cost, seed[0]) for label, (rows, _) in drawn.items()
        }
        precisions = [
            _precision_of(fitted[label].decision_function(values[rest]), targets[rest, label])
            for label, (_, rest) in drawn.items()
            if (targets[rest, label] == 1).any()
        ]
        machines.append(fitted)
        found.append(float(np.mean(precisions)) if precisions else 0.0)
    # Where all samples were drawn nothing can decide.
    return machines[int(np.argmax(found)) if any(found) else len(costs) // 2]


def scores_of(machines: Machines, values: Values, *, num_classes: int) -> npt.NDArray[np.float64]:
    """Return (N, C) scores; a class without a machine has none above minus infinity."""
    scores = np.full((len(values), num_classes), -np.inf)
    for label, machine in machines.items():
        scores[:, label] = machine.decision_function(values)
    return scores


def _classes(targets: Targets) -> list[int]:
    return np.flatnonzero((targets == 1).any(axis=0)).tolist()


def _precision_of(scores: npt.NDArray[np.floating[Any]], targets: npt.NDArray[np.int8]) -> float:
    counts = targets != -1
    return average_precision(scores[counts], targets[counts] == 1)


def _draw(targets: Targets, classes: list[int], shots: int, rng: np.random.Generator) -> dict[int, tuple[Rows, Rows]]:
    """Return the rows that each class learns from, and rows that decide on its cost.

    Where samples have one class each, all machines learn from the same ones. Where they have several, a machine has its
    own: `shots` positives and `shots` negatives for every other class (create_voc_low_shot_samples.py).
    """
    if (np.abs(targets).sum(axis=1) == 1).all():
        of_class = [rng.permutation(np.flatnonzero(targets[:, label] == 1))[:shots] for label in classes]
        rows = np.concatenate(of_class)
        rest = rng.permutation(np.setdiff1d(np.arange(len(targets)), rows))[:_MAX_DECIDING]
        return dict.fromkeys(classes, (rows, rest))
    drawn: dict[int, tuple[Rows, Rows]] = {}
    for label in classes:
        positives, negatives = (rng.permutation(np.flatnonzero(targets[:, label] == value)) for value in (1, 0))
        rows = np.concatenate([positives[:shots], negatives[: shots * (targets.shape[1] - 1)]])
        drawn[label] = rows, rng.permutation(np.setdiff1d(np.arange(len(targets)), rows))[:_MAX_DECIDING]
    return drawn


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
