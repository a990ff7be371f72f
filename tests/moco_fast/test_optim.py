import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.config import OptimConfig
from moco_fast.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def train(module, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.rand(6, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def test_sgd_decays_all_parameters_as_the_paper_does():
    module = model()
    optimizer = build_optimizer(module, OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01))
    values = {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}
    velocity = dict.fromkeys(values, 0.0)
    for step in range(3):
        for name, parameter in module.named_parameters():
            gradient = np.full(parameter.shape, 0.1 * (step + 1))
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            velocity[name] = 0.9 * velocity[name] + gradient + 0.01 * values[name]
            values[name] = values[name] - 0.1 * velocity[name]
        optimizer.step()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_left_out():
    module = model()
    module[0].requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_state_as_tensors_continues_bit_for_bit():
    module, other = model(0), model(1)
    optimizer, other_optimizer = (build_optimizer(each, OptimConfig(lr=0.1)) for each in (module, other))
    train(module, optimizer, 3)
    tensors = optimizer_tensors(optimizer, module)
    assert tensors.keys() == {f"momentum_buffer/{name}" for name, _ in module.named_parameters()}
    other.load_state_dict(module.state_dict())
    load_optimizer_tensors(other_optimizer, other, {name: tensor.clone() for name, tensor in tensors.items()})
    train(module, optimizer, 3, seed=5)
    train(other, other_optimizer, 3, seed=5)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_encoder_is_refused():
    module = model()
    optimizer = build_optimizer(module, OptimConfig())
    with pytest.raises(ValueError, match=r"'momentum_buffer/9\.weight'"):
        load_optimizer_tensors(optimizer, module, {"momentum_buffer/9.weight": torch.zeros(1)})
