"""Multinomial logistic regression with an L2 penalty, by L-BFGS on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast.evaluation.features import evenly, near, rows_at_once
from moco_fast.evaluation.labels import choice_split

__all__ = ["Axes", "Fitted", "fit_chosen", "fit_logistic", "fit_path", "principal_axes"]

_MIN_ROWS = 8192  # by which the axes of features are found, where there are so many


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


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Principal axes of features: along each, a step whose length fits the curvature there leads to the minimum.

    L-BFGS needs several times as many iterations without them where variances differ by orders of magnitude, as those
    of raw pixels do.
    """

    mean: Tensor
    """(D,)"""
    directions: Tensor
    """(D, D): one in each column."""
    deviations: Tensor
    """(D,) of the features along each."""

    def fit(self, theta: Tensor, *, penalty: float) -> Fitted:
        """Return the regression for numbers in which the objective is curved by about 1 in every direction.

        Args:
            theta: (C, D + 1), those of the axes and, last, the bias of centered features.
            penalty: curvature that the penalty adds.
        """
        root = len(theta) ** 0.5
        weight = (theta[:, :-1] / self._curvatures(root, penalty)) @ self.directions.T
        return Fitted(weight=weight, bias=theta[:, -1] * root - weight @ self.mean)

    def theta(self, fit: Fitted, *, penalty: float) -> Tensor:
        """Return the numbers for which `fit` returns a regression."""
        root = len(fit.bias) ** 0.5
        along = fit.weight @ self.directions * self._curvatures(root, penalty)
        return torch.cat([along, (fit.bias + fit.weight @ self.mean)[:, None] / root], dim=1)

    def _curvatures(self, root: float, penalty: float) -> Tensor:
        """Return the roots of the curvatures; that of a softmax over C classes is about 1 / C at the start."""
        return torch.hypot(self.deviations / root, self.deviations.new_tensor(penalty**0.5))


def principal_axes(features: Tensor, *, device: torch.device) -> Axes:
    """Find the principal axes of (N, D) features, by rows that are evenly spread over them: good ones are enough.

    In float64, in which the squares of large features are finite.
    """
    num, dim = features.shape
    chosen = torch.from_numpy(evenly(num, min(num, max(_MIN_ROWS, 2 * dim))))
    values = features[chosen.to(features.device)].to(device).double()
    mean = values.mean(dim=0)
    values -= mean
    variances, directions = torch.linalg.eigh(values.T @ values / len(values))
    # What hardly varies has no part in the scores; a long step along it would only amplify rounding.
    deviations = variances.clamp(min=1e-6 * float(variances[-1]) + 1e-30).sqrt()
    mean, directions, deviations = (each.to(features.dtype) for each in (mean, directions, deviations))
    return Axes(mean=mean, directions=directions, deviations=deviations)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    c: float,
    max_iter: int,
    tolerance: float = 1e-4,
    start: Fitted | None = None,
    axes: Axes | None = None,
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
        axes: of the features, to take fewer iterations; without leading dimensions only.

    Raises:
        ValueError: features are so large that the objective is not a number.
    """
    num, dim = features.shape[-2:]
    # The objective divided by C * N: its size does not depend on either, nor does when to stop.
    loss = _PenalizedLoss(features=features, labels=labels, penalty=0.5 / (c * num), axes=axes)
    theta = features.new_zeros(*features.shape[:-2], num_classes, dim + 1, device=labels.device)
    if start is not None:
        theta.copy_(loss.theta(start))
    theta.requires_grad_(True)
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
        return loss.differentiate(theta)

    with torch.enable_grad():
        optimizer.step(closure)
    found = loss.fit(theta.detach())
    if not bool(found.weight.isfinite().all()):
        raise ValueError(
            f"logistic regression finds no numbers: features reach {float(features.abs().max()):.1e}, so evaluate "
            "another layer, or an earlier checkpoint"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _PenalizedLoss:
    """What is minimized, as a function of (..., C, D + 1) numbers theta."""

    features: Tensor
    labels: Tensor
    penalty: float
    axes: Axes | None

    def fit(self, theta: Tensor) -> Fitted:
        if self.axes is not None:
            return self.axes.fit(theta, penalty=2 * self.penalty)
        return Fitted(weight=theta[..., :-1], bias=theta[..., -1])

    def theta(self, fit: Fitted) -> Tensor:
        if self.axes is not None:
            return self.axes.theta(fit, penalty=2 * self.penalty)
        return torch.cat([fit.weight, fit.bias[..., None]], dim=-1)

    def differentiate(self, theta: Tensor) -> Tensor:
        """Add the gradient to that of theta, part of the features by part, and return the value."""
        total = self.penalty * self.fit(theta).weight.square().sum()
        total.backward()
        device, num = self.labels.device, self.features.shape[-2]
        rows = rows_at_once(self.features, device, dim=-2)
        for values, targets in zip(self.features.split(rows, dim=-2), self.labels.split(rows, dim=-1), strict=True):
            scores = self.fit(theta).scores(values.to(device)).flatten(0, -2)
            loss = torch.nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum") / num
            loss.backward()
            total = total + loss.detach()
        return total.detach()


def fit_path(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    cs: Sequence[float],
    max_iter: int,
    tolerance: float = 1e-4,
    axes: Axes | None = None,
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
                axes=axes,
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
    axes = principal_axes(fitted, device=device)
    path = fit_path(fitted, labels[fits].to(device), num_classes=num_classes, cs=cs, max_iter=max_iter, axes=axes)
    right = [int((fit.predict(deciding) == labels[decides]).sum()) for fit in path]
    best = max(range(num_c), key=lambda number: right[number])  # of several, the one with the strongest penalty
    labels = labels.to(device)
    fit = fit_logistic(
        features, labels, num_classes=num_classes, c=cs[best], max_iter=max_iter, start=path[best], axes=axes
    )
    return fit, cs[best]
