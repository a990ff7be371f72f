from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.shuffle import build_policy
from moco_fast.optimizers.optim import build_optimizer, optimizer_tensors
from moco_fast.presets import PRESETS
from moco_fast.sizing.recipe import recipe_cost


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("moco-v2", "sgd"),
        ("moco-v3-vit-small", "adamw"),
        ("byol", "lars"),
        ("simsiam", "lamb"),
        ("memory-bank", "sgd"),
        ("end-to-end", "sgd"),
    ],
)
def test_a_checkpoint_holds_what_was_counted(name: str, optimizer: Any) -> None:
    """One step of a real, narrow model of each method, with each optimizer."""
    config = PRESETS[name][1]
    config = replace(config, model=replace(config.model, encoder="resnet18_quarter", freeze_patch_projection=False))
    config = replace(config, optim=replace(config.optim, name=optimizer))
    query = build_encoder(config.model, config.method, image_size=config.views.size)
    policy = build_policy(replace(config.bn, policy="none"), batch_size=2, local_world_size=1)
    device = torch.device("cpu")
    setting = Setting(query=query, policy=policy, num_samples=500, seed=0, device=device, available_bytes=1 << 40)
    modules: list[nn.Module] = [query, *config.method.build(setting).modules.values()]
    stepped = build_optimizer(query, config.optim, constant_lr=config.method.constant_lr)
    for parameter in query.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    stepped.step()
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += optimizer_tensors(stepped, query).values()
    counted = recipe_cost(config, num_samples=500).checkpoint_bytes
    # Steps are counted once for each parameter, in a number of their own.
    assert counted == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=1e-3)


def test_a_memory_bank_of_a_billion_images_is_counted_and_not_made() -> None:
    cost = recipe_cost(PRESETS["memory-bank"][1], num_samples=1_000_000_000)
    assert cost.checkpoint_bytes == pytest.approx(1e9 * 128 * 4, rel=0.01)


def test_operations_of_the_published_networks() -> None:
    """ResNet-50 takes 4.1 GMACs for an image, and three times that with its gradients; a key has none."""
    cost = recipe_cost(PRESETS["moco-v2"][1], num_samples=1)
    assert cost.flops_per_sample == pytest.approx(32.5e9, rel=0.01)
    assert cost.is_convolutional
    vit = recipe_cost(PRESETS["moco-v3-vit-base"][1], num_samples=1)
    assert not vit.is_convolutional


def test_an_unknown_encoder_is_refused() -> None:
    config = replace(PRESETS["moco-v2"][1], model=ModelConfig(encoder="resnet5"))
    with pytest.raises(ValueError, match="resnet5"):
        recipe_cost(config, num_samples=1)
