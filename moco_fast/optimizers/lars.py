"""LARS optimizer with which MoCo v3 trains its ResNets (moco/optimizer.py of facebookresearch/moco-v3)."""
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimizers are made of these functions, which have no public name.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Lars"]


class Lars(Optimizer):
    """Momentum SGD whose step of each weight is scaled by the weight's norm: trust * |w| / |g + d w|.

    Weight decay d comes first, then the ratio, then the momentum. The ratio is 1 where either norm is zero. Parameters
    of at most one dimension (biases, batch-norm scales) are neither decayed nor scaled. timm's LARS divides by
    |g| + d |w| instead, which gives smaller steps where g is small: by 9% at |g| = 1e-5 |w| and d = 1e-6.

    Args:
        parameters: parameters to train, or groups of them (`params`).
        lr: learning rate.
        momentum: momentum of the scaled update.
        weight_decay: d.
        trust: coefficient of the ratio.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares overloads
        """Step once for all parameters together; those without a gradient do not change."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = _scaled([(p, p.grad) for p in parameters], group)
            velocities = [self._velocity(parameter) for parameter in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    def _velocity(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _scaled(pairs: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> list[Tensor]:
    """Return the parameters' updates before momentum, given their gradients, which do not change."""
    weights = [parameter for parameter, _ in pairs if parameter.ndim > 1]
    if not weights:
        return [gradient for _, gradient in pairs]
    gradients = [gradient for parameter, gradient in pairs if parameter.ndim > 1]
    updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    of_weights, of_updates = (torch.stack(torch._foreach_norm(each)) for each in (weights, updates))  # (N,) each
    ratios = torch.where((of_weights > 0) & (of_updates > 0), group["trust"] * of_weights / of_updates, 1.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    scaled = iter(updates)
    return [next(scaled) if parameter.ndim > 1 else gradient for parameter, gradient in pairs]
