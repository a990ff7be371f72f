"""Multinomial logistic regression with an L2 penalty, by L-BFGS on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast.evaluation.features import near, rows_at_once
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

    def predict(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        """Return the class of the highest score, (N, D) -> (N,) on the host, part by part.

        Args:
            features: (N, D), on any device.
            among: (R,) int64 classes that compete; None: all.
        """
        classes = torch.arange(len(self.bias)) if among is None else among
        device = self.bias.device
        picked = classes.to(device)
        parts = features.split(rows_at_once(features, device))
        return torch.cat([classes[self.scores(part.to(device))[:, picked].argmax(dim=1).cpu()] for part in parts])


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
        features: (..., N, D) floating point; may be on the host, from where each iteration brings them part by part.
        labels: (..., N) int64, on the device that computes.
        num_classes: number of classes.
        c: inverse strength of the penalty, C; biases have none.
        max_iter: of L-BFGS.
        tolerance: largest gradient of the objective per sample at which it ends; the default is scikit-learn's.
        start: where to start; None: at zero.
    """
    num, dim = features.shape[-2:]
    theta = features.new_zeros(*features.shape[:-2], num_classes, dim + 1, device=labels.device)
    rows = rows_at_once(features, labels.device, dim=-2)
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
        total = penalty * theta[..., :dim].square().sum()
        total.backward()
        for values, targets in zip(features.split(rows, dim=-2), labels.split(rows, dim=-1), strict=True):
            fit = Fitted(weight=theta[..., :dim], bias=theta[..., dim])
            scores = fit.scores(values.to(labels.device)).flatten(0, -2)
            loss = torch.nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum") / num
            loss.backward()
            total = total + loss.detach()
        return total.detach()

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
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    num_c: int,
    max_iter: int,
    share: float,
    seed: int,
    device: torch.device,
) -> tuple[Fitted, float]:
    """Choose C on a part of a training set, and fit to all of it with this C (Ericsson et al. 2021).

    Args:
        features: (N, D) floating point, on the host or the device; they stay on the host if they are large for it.
        labels: (N,) int64, at least 0, on the host.
        num_classes: number of classes.
        num_c: values of C from 1e-6 to 1e5, evenly spread over the exponents.
        max_iter: of L-BFGS.
        share: of each class that decides.
        seed: of the draw of what decides.
        device: where to compute.

    Returns:
        the regression, and its C.
    """
    features = near(features, device)
    fits, decides = choice_split(labels, share=share, seed=seed)
    fitted, deciding = (features[rows.to(features.device)] for rows in (fits, decides))
    cs: list[float] = torch.logspace(-6, 5, num_c, dtype=torch.float64).tolist()
    path = fit_path(fitted, labels[fits].to(device), num_classes=num_classes, cs=cs, max_iter=max_iter)
    right = [int((fit.predict(deciding) == labels[decides]).sum()) for fit in path]
    best = max(range(num_c), key=lambda number: right[number])  # of several, the one with the strongest penalty
    labels = labels.to(device)
    fit = fit_logistic(features, labels, num_classes=num_classes, c=cs[best], max_iter=max_iter, start=path[best])
    return fit, cs[best]
