"""Optimizers of NVIDIA's apex, where it is installed. No other file uses apex."""

import importlib
from importlib.util import find_spec
from typing import Any

from torch.optim import Optimizer

from moco_fast.config import OptimConfig

__all__ = ["apex_optimizer"]


def apex_optimizer(parameters: list[dict[str, Any]], optim: OptimConfig) -> Optimizer:
    """Build one of apex's fused optimizers, with the settings that `build_optimizer` gives torch's and timm's.

    Raises:
        ValueError: apex is not installed, the installed `apex` is another package or was built without kernels, or it
            has no such optimizer.
    """
    optimizers: Any = _import_optimizers()
    try:
        return _build(optimizers, parameters, optim)
    except RuntimeError as error:
        raise ValueError(f"--optim.kernels apex cannot be used here ({error}): use --optim.kernels torch") from error


def _build(optimizers: Any, parameters: list[dict[str, Any]], optim: OptimConfig) -> Optimizer:
    common = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    match optim.name:
        case "sgd":
            return optimizers.FusedSGD(parameters, momentum=optim.momentum, set_grad_none=True, **common)
        case "adamw":
            return optimizers.FusedAdam(parameters, betas=optim.betas, adam_w_mode=True, **common)
        case "lamb":
            # Clipping is a separate step, for all optimizers; apex cannot switch it off, hence the infinite norm.
            return optimizers.FusedLAMB(parameters, betas=optim.betas, max_grad_norm=float("inf"), **common)
        case "lars":
            raise ValueError("--optim.kernels apex has no LARS: use --optim.kernels torch, whose LARS is fused too")


def _import_optimizers() -> object:
    if find_spec("apex") is None:
        raise ValueError(
            "--optim.kernels apex needs NVIDIA's apex, which is not installed: run in the container image that our "
            "Dockerfile builds, or use --optim.kernels torch"
        )
    if find_spec("apex.optimizers") is None:
        raise ValueError(
            "--optim.kernels apex found PyPI's `apex`, an unrelated web toolkit, not NVIDIA's: pip uninstall apex, and "
            "run in the container image that our Dockerfile builds, or use --optim.kernels torch"
        )
    return importlib.import_module("apex.optimizers")
