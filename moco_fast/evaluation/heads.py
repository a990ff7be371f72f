"""Linear classifiers trained side by side on the same features, each with its own learning rate."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.ground.digests import digest

__all__ = ["Classifier", "LinearHeads", "Scaler", "cosine", "permuted_batches", "steps_down"]


class LinearHeads:
    """H classifiers of C classes on features of D numbers, with the same first weights and SGD with momentum.

    The loss of each is the mean cross-entropy of the labeled samples. Its gradient is written out, for all heads in one
    product: the softmax less the label, times the features.

    Args:
        dim: D.
        num_classes: C.
        learning_rates: (H,) one for each head.
        momentum: of SGD.
        weight_decay: of SGD, on weights and biases as torch's.
        seed: of the first weights, which are drawn from N(0, 0.01); biases are 0.
        device: where they are.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        learning_rates: Sequence[float],
        *,
        momentum: float,
        weight_decay: float,
        seed: int,
        device: torch.device,
    ) -> None:
        num_heads = len(learning_rates)
        first = 0.01 * torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed))
        self.weight = first.repeat(num_heads, 1, 1).to(device)  # (H, C, D)
        self.bias = torch.zeros(num_heads, num_classes, device=device)
        self._rates = torch.tensor(learning_rates, device=device)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, H, C)."""
        return (features @ self.weight.flatten(0, 1).T).unflatten(1, self.bias.shape) + self.bias

    def step(self, features: Tensor, labels: Tensor, *, schedule: float) -> None:
        """Take one step of SGD.

        Args:
            features: (B, D).
            labels: (B,) int64; samples with -1 have no part in the loss.
            schedule: what the learning rates are multiplied with.
        """
        has_label = labels >= 0
        error = self.logits(features).softmax(dim=2)  # (B, H, C)
        target = labels.clamp(min=0)[:, None, None].expand(-1, error.shape[1], 1)
        error.scatter_add_(2, target, torch.full_like(error[:, :, :1], -1))
        error *= (has_label / has_label.sum().clamp(min=1))[:, None, None]
        gradients = (error.flatten(1).T @ features).view_as(self.weight), error.sum(dim=0)
        for value, gradient, velocity in zip((self.weight, self.bias), gradients, self._velocity, strict=True):
            if self._weight_decay:
                gradient.add_(value, alpha=self._weight_decay)
            velocity.mul_(self._momentum).add_(gradient)
            value.sub_(velocity * (schedule * self._rates).view(-1, *[1] * (value.ndim - 1)))

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and momentum by name."""
        weight, bias = self._velocity
        return {"weight": self.weight, "bias": self.bias, "velocity.weight": weight, "velocity.bias": bias}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore copies of what `tensors` returned."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def ranked(self, batches: Iterator[Tensor] | Sequence[Tensor], *, top: int, among: Tensor | None = None) -> Tensor:
        """Return the classes with the highest scores, best first: (N, H, top) on the host.

        Args:
            batches: (B, D) each.
            top: number of classes.
            among: (R,) int64 classes that compete; None: all.
        """
        classes = torch.arange(self.bias.shape[1]) if among is None else among
        picked = classes.to(self.bias.device)
        return torch.cat([classes[self.logits(batch)[..., picked].topk(top, dim=2).indices.cpu()] for batch in batches])


class Scaler:
    """Mean and standard deviation of features, measured on some and removed from all.

    A linear classifier of what is left is one of the features themselves; only the path to it is shorter.

    Args:
        features: (N, D), on any device; looked at in parts.
        rows: (R,) numbers of the rows that are measured.
    """

    def __init__(self, features: Tensor, rows: Tensor) -> None:
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        squares = torch.zeros_like(total)
        parts = rows.to(features.device).split(_ROWS)
        for part in parts:
            total += features[part].double().sum(dim=0)
        mean = total / len(rows)
        for part in parts:
            squares += (features[part].double() - mean).square().sum(dim=0)
        std = (squares / len(rows)).sqrt()
        self.mean = mean.float()
        # A feature that never changes says nothing, and is left at 0.
        self.scale = torch.where(std > 1e-6 * std.max(), 1 / std.clamp(min=1e-30), 0).float()

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.mean.to(features.device)) * self.scale.to(features.device)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained head with the scaler of its features."""

    mean: Tensor
    """(D,)"""
    scale: Tensor
    """(D,)"""
    weight: Tensor
    """(C, D)"""
    bias: Tensor
    """(C,)"""

    def __call__(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C), with gradient."""
        return ((features - self.mean) * self.scale) @ self.weight.T + self.bias

    def to(self, device: torch.device) -> "Classifier":
        """Return the same on a device."""
        return Classifier(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def digest(self) -> str:
        """Of everything that it computes with."""
        return digest(b"".join(value.cpu().numpy().tobytes() for value in vars(self).values()))


_ROWS = 8192


def permuted_batches(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Give row numbers in the order of an epoch, batch by batch; a short last batch is left out unless it is alone."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(num_rows, generator=generator)
    yield from order[: max(num_rows // batch_size * batch_size, min(num_rows, batch_size))].split(batch_size)


def cosine(done: float) -> float:
    """Fall from 1 to 0 as half a cosine over a training of which the share `done` is over."""
    return 0.5 * (1 + math.cos(math.pi * done))


def steps_down(milestones: Sequence[float], *, to: float = 0.1) -> Callable[[float], float]:
    """Return the schedule that is multiplied with `to` at each of the shares of the training."""
    return lambda done: to ** sum(done >= milestone for milestone in milestones)
