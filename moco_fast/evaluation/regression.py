"""Multinomial logistic regression with an L2 penalty, by L-BFGS on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast.evaluation.labels import choice_split

__all__ = ["Fitted", "fit_chosen", "fit_logistic", "fit_path"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fitted regression."""

    weight: Tensor
    """(..., C, D)"""
    bias: Tensor
    """(..., C)"""

    def scores(self, features: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, C)."""
        return features @ self.weight.mT + self.bias.unsqueeze(-2)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    c: float,
    max_iter: int,
    tolerance: float = 1e-4,
    start: Fitted | None = None,
) -> Fitted:
    """Minimize C * sum of the cross-entropies + |weight|^2 / 2, as scikit-learn's LogisticRegression does.

    With leading dimensions, that many regressions of as many samples are fitted at once, each to its own minimum.

    Args:
        features: (..., N, D) floating point.
        labels: (..., N) int64, on the same device.
        num_classes: number of classes.
        c: inverse strength of the penalty, C; biases have none.
        max_iter: of L-BFGS.
        tolerance: largest gradient of the objective per sample at which it ends; the default is scikit-learn's.
        start: where to start; None: at zero.
    """
    num, dim = features.shape[-2:]
    theta = features.new_zeros(*features.shape[:-2], num_classes, dim + 1)
    if start is not None:
        theta[..., :dim], theta[..., dim] = start.weight, start.bias
    theta.requires_grad_(True)
    # The objective divided by C * N: its size does not depend on either, nor does when to stop.
    penalty = 0.5 / (c * num)
    optimizer = torch.optim.LBFGS(
        [theta],
        lr=1,
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = Fitted(weight=theta[..., :dim], bias=theta[..., dim])
        scores = fit.scores(features).flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum") / num
        loss = loss + penalty * fit.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = theta.detach()
    return Fitted(weight=found[..., :dim], bias=found[..., dim])


def fit_path(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    cs: Sequence[float],
    max_iter: int,
    tolerance: float = 1e-4,
) -> list[Fitted]:
    """Fit with every C, given in rising order, each from where the one before ended."""
    found: list[Fitted] = []
    for c in cs:
        found.append(
            fit_logistic(
                features,
                labels,
                num_classes=num_classes,
                c=c,
                max_iter=max_iter,
                tolerance=tolerance,
                start=found[-1] if found else None,
            )
        )
    return found


def fit_chosen(
    features: Tensor, labels: Tensor, *, num_classes: int, num_c: int, max_iter: int, share: float, seed: int
) -> tuple[Fitted, float]:
    """Choose C on a part of a training set, and fit to all of it with this C (Ericsson et al. 2021).

    Args:
        features: (N, D) floating point.
        labels: (N,) int64, at least 0, on the host.
        num_classes: number of classes.
        num_c: values of C from 1e-6 to 1e5, evenly spread over the exponents.
        max_iter: of L-BFGS.
        share: of each class that decides.
        seed: of the draw of what decides.

    Returns:
        the regression, and its C.
    """
    fits, decides = (rows.to(features.device) for rows in choice_split(labels, share=share, seed=seed))
    labels = labels.to(features.device)
    cs: list[float] = torch.logspace(-6, 5, num_c, dtype=torch.float64).tolist()
    path = fit_path(features[fits], labels[fits], num_classes=num_classes, cs=cs, max_iter=max_iter)
    right = [(fit.scores(features[decides]).argmax(dim=1) == labels[decides]).sum().item() for fit in path]
    best = max(range(num_c), key=lambda number: right[number])  # of several, the one with the strongest penalty
    fit = fit_logistic(features, labels, num_classes=num_classes, c=cs[best], max_iter=max_iter, start=path[best])
    return fit, cs[best]
