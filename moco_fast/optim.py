"""Optimizers, and their state as named tensors."""

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from moco_fast.config import OptimConfig

__all__ = ["build_optimizer", "load_optimizer_tensors", "optimizer_tensors"]


def build_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer of all parameters of `module` that take gradients, with torch's fused kernels.

    Raises:
        ValueError: an unknown optimizer.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)


def _named_indices(optimizer: Optimizer, module: nn.Module) -> dict[int, str]:
    """Place of each parameter in the optimizer's state dict -> its name in the module."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `<state>/<parameter's name>` -> tensor. Settings are left to the configuration."""
    names = _named_indices(optimizer, module)
    return {
        f"{key}/{names[index]}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back copies of what `optimizer_tensors` gave.

    Raises:
        ValueError: tensors of another optimizer or module.
    """
    indices = {name: index for index, name in _named_indices(optimizer, module).items()}
    parameters = dict(module.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in indices:
            raise ValueError(
                f"the optimizer's state has {full_name!r}, which this encoder lacks: load the run it is of"
            )
        # As the parameter lies in memory: a file keeps values, not strides, and fused kernels need them equal.
        like = parameters[name] if parameters[name].shape == tensor.shape else tensor
        state.setdefault(indices[name], {})[key] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
