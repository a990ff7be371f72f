import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.config import OptimConfig
from moco_fast.optimizers.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors


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


STATES = {
    "sgd": {"momentum_buffer"},
    "lars": {"momentum_buffer"},
    "adamw": {"exp_avg", "exp_avg_sq", "step"},
    "lamb": {"exp_avg", "exp_avg_sq", "step"},
}


@pytest.mark.parametrize("name", STATES)
def test_state_as_tensors_continues_bit_for_bit(name):
    module, other = model(0), model(1)
    optim = OptimConfig(name=name, lr=0.1, weight_decay=0.01)
    optimizer, other_optimizer = (build_optimizer(each, optim) for each in (module, other))
    train(module, optimizer, 3)
    tensors = optimizer_tensors(optimizer, module)
    assert {key.partition("/")[0] for key in tensors} == STATES[name]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    other.load_state_dict(module.state_dict())
    load_optimizer_tensors(other_optimizer, other, {name: tensor.clone() for name, tensor in tensors.items()})
    train(module, optimizer, 3, seed=5)
    train(other, other_optimizer, 3, seed=5)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_is_laid_out_in_memory_as_its_parameter_is():
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module, OptimConfig())
    as_in_a_file = {"momentum_buffer/weight": torch.rand(4, 4, 3, 3)}
    load_optimizer_tensors(optimizer, module, as_in_a_file)
    loaded = optimizer.state[module.weight]["momentum_buffer"]
    assert loaded.stride() == module.weight.stride()
    assert torch.equal(loaded, as_in_a_file["momentum_buffer/weight"])


def naive_lars(values, gradients, velocity, lr, momentum, weight_decay, trust):
    """MoCo v3's optimizer in float64."""
    for name, w in values.items():
        update = gradients[name]
        if w.ndim > 1:
            update = update + weight_decay * w
            norms = np.linalg.norm(w), np.linalg.norm(update)
            update = update * (trust * norms[0] / norms[1] if min(norms) > 0 else 1)
        velocity[name] = momentum * velocity[name] + update
        values[name] = w - lr * velocity[name]


# Gradients of |g| / |w|; timm's form of the ratio would make the step 9% smaller at 1e-5, and a thousandth of it at 0.
@pytest.mark.parametrize("size", [1.0, 1e-5, 0.0])
@pytest.mark.parametrize("weight_decay", [1e-6, 0.0])
@pytest.mark.parametrize("zero", [None, "0.weight", "2.weight"])
def test_lars_is_v3s(size, weight_decay, zero):
    module = model().double()
    if zero:
        module.get_parameter(zero).data.zero_()
    optim = OptimConfig(name="lars", lr=2.0, momentum=0.9, weight_decay=weight_decay, trust=0.01)
    optimizer = build_optimizer(module, optim)
    values = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    velocity = dict.fromkeys(values, 0.0)
    for step in range(4):
        gradients = {}
        for number, (name, p) in enumerate(module.named_parameters()):
            gradients[name] = size * np.random.default_rng([step, number]).standard_normal(p.shape)
            p.grad = torch.tensor(gradients[name])
        optimizer.step()
        naive_lars(values, gradients, velocity, 2.0, 0.9, weight_decay, 0.01)
        for name, p in module.named_parameters():
            assert torch.equal(p.grad, torch.tensor(gradients[name])), "the gradient is the caller's"
    for name, p in module.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), values[name], rtol=1e-12, atol=1e-15, err_msg=name)


def test_lars_leaves_parameters_without_a_gradient_alone():
    module = model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(module, OptimConfig(name="lars", lr=1.0))
    optimizer.step()
    module[2].weight.grad = torch.ones_like(module[2].weight)
    optimizer.step()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"2.weight"}
    assert {key.partition("/")[2] for key in optimizer_tensors(optimizer, module)} == changed


def test_adamw_is_the_papers():
    module = model()
    optim = OptimConfig(name="adamw", lr=0.01, weight_decay=0.1)
    optimizer = build_optimizer(module, optim)
    w = {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}
    m, v = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
    for step in range(1, 4):
        for name, p in module.named_parameters():
            g = np.full(p.shape, 0.3 * step)
            p.grad = torch.tensor(g, dtype=torch.float32)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
            update = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
            w[name] = w[name] * (1 - 0.01 * 0.1) - 0.01 * update
        optimizer.step()
    for name, p in module.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), w[name], rtol=1e-4, atol=1e-6)


def test_lamb_scales_each_layer_by_its_norm_and_does_not_clip_by_itself():
    module = nn.Linear(3, 2, bias=False)
    before = module.weight.detach().numpy().astype(np.float64)
    optimizer = build_optimizer(module, OptimConfig(name="lamb", lr=0.1, weight_decay=0.02))
    gradient = np.array([[5.0, -5.0, 5.0], [5.0, 5.0, -5.0]])
    module.weight.grad = torch.tensor(gradient, dtype=torch.float32)
    optimizer.step()
    update = np.sign(gradient) + 0.02 * before
    expected = before - 0.1 * np.linalg.norm(before) / np.linalg.norm(update) * update
    np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-4)


def install(folder, monkeypatch, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


APEX = OptimConfig(kernels="apex", lr=0.1, momentum=0.8, weight_decay=0.05)


def test_without_apex_the_way_to_it_is_told():
    with pytest.raises(ValueError, match="NVIDIA's apex, which is not installed"):
        build_optimizer(model(), APEX)


def test_the_other_apex_is_told_apart(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, {"apex/__init__.py": ""})
    with pytest.raises(ValueError, match="unrelated web toolkit"):
        build_optimizer(model(), APEX)


def test_apex_without_its_kernels_is_told(tmp_path, monkeypatch):
    source = "def FusedSGD(params, **_):\n    raise RuntimeError('apex.optimizers.FusedSGD requires cuda extensions')\n"
    install(tmp_path, monkeypatch, {"apex/__init__.py": "", "apex/optimizers/__init__.py": source})
    with pytest.raises(ValueError, match=r"requires cuda extensions\): use --optim.kernels torch"):
        build_optimizer(model(), APEX)
    with pytest.raises(ValueError, match="no LARS"):
        build_optimizer(model(), replace(APEX, name="lars"))


def test_state_of_another_encoder_is_refused():
    module = model()
    optimizer = build_optimizer(module, OptimConfig())
    with pytest.raises(ValueError, match=r"'momentum_buffer/9\.weight'"):
        load_optimizer_tensors(optimizer, module, {"momentum_buffer/9.weight": torch.zeros(1)})
