"""Adversarial examples: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018), in balls of the norms Linf and L2.

Images are (B, 3, H, W) float32 in 0..1, as a model that normalizes within itself takes them. Every sample has its own
ball and its own budget: which other samples share its batch does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Attack", "Norm", "attack"]

Norm = Literal["linf", "l2"]
Classify = Callable[[Tensor], Tensor]
"""(B, 3, H, W) in 0..1 to logits (B, C), with gradient."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How images are perturbed."""

    norm: Norm
    eps: float
    """Radius of the ball: the largest change of a pixel's color (linf) or the length of the whole change (l2), for
    colors in 0..1."""
    steps: int = 1
    step_size: float | None = None
    """Unset: eps for one step, else 2.5 * eps / steps, so that the edge is reached from anywhere (Madry et al.)."""
    random_start: bool = False
    """Begin at a point of the ball that is drawn for each sample, instead of at its center."""
    seed: int = 0

    @property
    def length(self) -> float:
        """Length of a step."""
        if self.step_size is not None:
            return self.step_size
        return self.eps if self.steps == 1 else 2.5 * self.eps / self.steps


def attack(classify: Classify, images: Tensor, labels: Tensor, how: Attack, *, index: Tensor) -> Tensor:
    """Return the worst point of each image: one that is classified wrongly, and of several that of the highest loss.

    The image itself is one of them, so that neither more steps nor a random start make a sample look more robust than
    it is.

    Args:
        classify: the model.
        images: (B, 3, H, W) float32 in 0..1.
        labels: (B,) int64, at least 0, on the device of the images.
        how: norm, radius and steps.
        index: (B,) sample numbers, on which what is drawn depends.

    Returns:
        (B, 3, H, W) within the ball and in 0..1.
    """
    worst = _Worst(classify, images, labels)
    point = images
    if how.random_start and how.eps > 0:
        worst.look(images, with_gradient=False)
        point = _inside(images + _drawn(images, how, index), images, how)
    for _ in range(how.steps):
        gradient = worst.look(point)
        point = _inside(point + how.length * _direction(gradient, how.norm), images, how)
    worst.look(point, with_gradient=False)
    return worst.points


class _Worst:
    """The worst point of each image among those that were looked at."""

    def __init__(self, classify: Classify, images: Tensor, labels: Tensor) -> None:
        self.points = images
        self._classify, self._labels = classify, labels
        self._losses = torch.full(labels.shape, -torch.inf, device=images.device)
        self._is_wrong = torch.zeros_like(labels, dtype=torch.bool)

    def look(self, points: Tensor, *, with_gradient: bool = True) -> Tensor:
        """Look at a point of each image; return the gradient of its loss, or zeros."""
        with torch.set_grad_enabled(with_gradient):
            points = points.detach().requires_grad_(with_gradient)
            logits = self._classify(points).float()
            losses = _loss(logits, self._labels)
            gradient = torch.autograd.grad(losses.sum(), points)[0] if with_gradient else torch.zeros_like(points)
        points, losses = points.detach(), losses.detach()
        is_wrong = logits.argmax(dim=1) != self._labels
        is_worse = torch.where(is_wrong == self._is_wrong, losses > self._losses, is_wrong)
        self._losses = torch.where(is_worse, losses, self._losses)
        self._is_wrong = self._is_wrong | is_wrong
        self.points = torch.where(is_worse[:, None, None, None], points, self.points)
        return gradient


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) -> (B,): how far all other classes together are above the right one.

    Cross-entropy is its softplus, so each rises where the other does, in the same direction. But of a confident answer
    the gradient of cross-entropy is 0 in float32, and an attack would stand still (Carlini & Wagner 2017, section 5).
    """
    is_right = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], value=True)
    others = logits.masked_fill(is_right, -torch.inf).logsumexp(dim=1)
    return others - logits.gather(1, labels[:, None])[:, 0]


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the step of length 1 that raises the loss most, by its linear approximation."""
    if norm == "linf":
        return gradient.sign()
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
    return gradient / length


def _inside(point: Tensor, images: Tensor, how: Attack) -> Tensor:
    """Return the nearest points in the ball around the images, then in 0..1."""
    change = point - images
    if how.norm == "linf":
        change = change.clamp(-how.eps, how.eps)
    else:
        length = change.flatten(1).norm(dim=1)[:, None, None, None]
        change = change * (how.eps / length.clamp(min=1e-30)).clamp(max=1)
    # Colors that lie in 0..1 already draw every point nearer to themselves: it stays in the ball.
    return (images + change).clamp(0, 1)


def _drawn(images: Tensor, how: Attack, index: Tensor) -> Tensor:
    """Draw a point of the ball for each sample, uniformly."""
    drawn = np.empty(images.shape, dtype=np.float32)
    for row, sample in enumerate(index.tolist()):
        rng = np.random.default_rng((how.seed, sample))
        if how.norm == "linf":
            drawn[row] = rng.uniform(-how.eps, how.eps, drawn.shape[1:])
        else:
            direction = rng.standard_normal(drawn.shape[1:], dtype=np.float32)
            reach = how.eps * rng.random() ** (1 / direction.size)
            drawn[row] = direction * (reach / np.linalg.norm(direction))
    return torch.from_numpy(drawn).to(images.device)
