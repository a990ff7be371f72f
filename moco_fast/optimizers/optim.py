"""Optimizers and their state as named tensors."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from moco_fast.config import OptimConfig
from moco_fast.optimizers.apex import apex_optimizer
from moco_fast.optimizers.lars import Lars

__all__ = ["build_adamw", "build_optimizer", "build_sgd", "load_optimizer_tensors", "optimizer_tensors"]


def build_optimizer(module: nn.Module, optim: OptimConfig, *, constant_lr: tuple[str, ...] = ()) -> Optimizer:
    """Build the optimizer of all parameters of `module` that require gradients.

    Parameters of the parts named in `constant_lr` form a separate group, whose learning rate no schedule changes.

    SGD and AdamW are torch's with its fused kernels, LAMB is timm's and LARS is MoCo v3's; the last two also handle all
    parameters at once.

    Raises:
        ValueError: apex is requested, but is not installed or has no such optimizer.
    """
    parameters = _in_groups(module, constant_lr)
    if optim.kernels == "apex":
        return apex_optimizer(parameters, optim)
    match optim.name:
        case "sgd":
            return build_sgd(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
        case "adamw":
            return build_adamw(parameters, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas)
        case "lamb":
            # Clipping is a separate step, for all optimizers.
            options: dict[str, Any] = {"betas": optim.betas, "weight_decay": optim.weight_decay, "max_grad_norm": None}
            return Lamb(parameters, lr=optim.lr, **options)
        case "lars":
            momentum, trust = optim.momentum, optim.trust
            return Lars(parameters, lr=optim.lr, momentum=momentum, weight_decay=optim.weight_decay, trust=trust)


def build_adamw(
    groups: list[dict[str, Any]], *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> AdamW:
    """Build torch's fused AdamW of groups of parameters."""
    return AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def build_sgd(
    groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float, nesterov: bool = False
) -> SGD:
    """Build torch's fused SGD of groups of parameters, with its state."""
    sgd = SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    # torch 2.13 allocates these at the first step and leaves them unset if its gradient overflows (float16).
    for parameter in _flat(sgd) if momentum else ():
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _in_groups(module: nn.Module, constant_lr: tuple[str, ...]) -> list[dict[str, Any]]:
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    constant = [name for name in trained if name.startswith(tuple(f"{part}." for part in constant_lr))]
    scheduled = [parameter for name, parameter in trained.items() if name not in constant]
    groups: list[dict[str, Any]] = [{"params": scheduled}]
    if constant:
        groups.append({"params": [trained[name] for name in constant], "constant_lr": True})
    return groups


def _flat(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Return each parameter's name in the module, in the order of the optimizer's state dict."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for parameter in _flat(optimizer)]


def _group_steps(optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the parameter groups that count their steps (LAMB, apex), by the name of that count."""
    for number, group in enumerate(optimizer.param_groups):
        if "step" in group:
            yield f"step/group {number}", group


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as `<state>/<parameter's name>` -> tensor; settings are in the configuration."""
    names = _names(optimizer, module)
    of_parameters = {
        f"{key}/{names[index]}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    return of_parameters | {name: torch.as_tensor(group["step"]) for name, group in _group_steps(optimizer)}


def load_optimizer_tensors(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore copies of what `optimizer_tensors` returned.

    Raises:
        ValueError: the tensors belong to another optimizer or module.
    """
    indices = {name: index for index, name in enumerate(_names(optimizer, module))}
    parameters = dict(module.named_parameters())
    groups = {f"group {number}": group for number, group in enumerate(optimizer.param_groups)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if key == "step" and name in groups:
            # apex counts in Python, timm in a tensor.
            groups[name]["step"] = tensor.clone() if tensor.is_floating_point() else int(tensor)
            continue
        if name not in indices:
            raise ValueError(
                f"the optimizer's state has {full_name!r}, which this encoder lacks: load the run that it belongs to"
            )
        # With the parameter's strides: a file keeps values only, and fused kernels need equal strides.
        like = parameters[name] if parameters[name].shape == tensor.shape else tensor
        state.setdefault(indices[name], {})[key] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
