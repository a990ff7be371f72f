"""What one sample and one checkpoint of a recipe cost, from shapes alone: no weight is made."""

from dataclasses import dataclass, replace

import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.shuffle import build_policy
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.training.flops import sample_flops

__all__ = ["RecipeCost", "recipe_cost"]

_STATES = {"sgd": 1, "lars": 1, "adamw": 2, "lamb": 2}
"""Tensors that an optimizer keeps for each trained one."""


@dataclass(frozen=True, kw_only=True)
class RecipeCost:
    """Cost of a recipe, independent of the machine."""

    flops_per_sample: float
    """Floating-point operations of a training step per sample, with all its views."""
    checkpoint_bytes: int
    """Encoders, queue or memory bank, and the optimizer's state."""
    is_convolutional: bool


def recipe_cost(config: Config, *, num_samples: int) -> RecipeCost:
    """Count a recipe's operations and tensors.

    Args:
        config: of the run.
        num_samples: in the training set: a memory bank has a row for each.

    Raises:
        ValueError: there is no such encoder, or it does not take the recipe's image size.
    """
    nowhere = torch.device("meta")
    with nowhere:
        query = build_encoder(config.model, config.method, image_size=config.views.size, crop=config.eval.crop)
        optimizer = build_optimizer(query, config.optim, constant_lr=config.method.constant_lr)
        objective = config.method.build(
            Setting(
                query=query,
                # Which samples share statistics changes neither shapes nor operations.
                policy=build_policy(replace(config.bn, policy="none"), batch_size=2, local_world_size=1),
                num_samples=num_samples,
                seed=0,
                device=nowhere,
                available_bytes=1 << 62,
            )
        )
    modules = (query, *objective.modules.values())
    model = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    trained = sum(parameter.nbytes for group in optimizer.param_groups for parameter in group["params"])
    return RecipeCost(
        flops_per_sample=sample_flops(config, query, objective.modules.get("key")),
        checkpoint_bytes=model + _STATES[config.optim.name] * trained,
        is_convolutional=any(
            isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in query.modules()
        ),
    )
