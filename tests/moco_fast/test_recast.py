"""Weights that are cast once per step; on the CPU in bfloat16, by the same autocast."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.recast import RecastWeights
from moco_fast.methods.shuffle import Together

bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def make_keys(*, recast, encoder="resnet18_quarter", head="mlp", backend=None):
    torch.manual_seed(0)
    method = MomentumContrastV3(dim=8, mlp_dim=16) if head == "v3" else MomentumContrast(head=head, dim=8)
    query = build_encoder(ModelConfig(encoder=encoder, stem="cifar"), method)
    query.to(memory_format=torch.channels_last)
    key = copy_as_key_encoder(query)
    if backend:
        key.compile(backend=backend)
    weights = RecastWeights(key, torch.bfloat16) if recast else None
    return query, key, MomentumKeys(key, MomentumUpdate(query, key), Together(), bf16, weights)


def step(query, keys, number):
    """Move the query encoder, then the key encoder, and give keys."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.1)
    keys.advance({"momentum": 0.9})
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=generator)
    return keys(None, images.contiguous(memory_format=torch.channels_last), torch.arange(4))


def test_a_key_encoder_is_compiled_and_cast_as_the_run_says():
    query = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(dim=8))
    setting = Setting(
        query=query, policy=Together(), num_samples=9, seed=0, device=torch.device("cpu"), available_bytes=1 << 30
    )
    compiled = []
    plain = MomentumKeys.of(replace(setting, compile=compiled.append))
    assert compiled == [plain.key]
    assert plain.key is not query
    assert plain.recast is None
    half = MomentumKeys.of(replace(setting, autocast=bf16, lower_precision=torch.bfloat16))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with CastsOfWeights() as casts:
        half(None, images, torch.arange(4))
    assert casts.num["single"] == 1, "of the images alone"
    with torch.no_grad():
        next(query.parameters()).add_(1)
    half.advance({"momentum": 0.0})
    assert all(torch.equal(key, query.get_parameter(name)) for name, key in half.key.named_parameters())


class CastsOfWeights(TorchDispatchMode):
    """Counts how often a tensor of float32 becomes one of bfloat16, by operator."""

    def __init__(self):
        super().__init__()
        self.num = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dim() in (2, 4):
            self.num["single"] += (args[0].dtype, result.dtype) == (torch.float32, torch.bfloat16)
        self.num["together"] += func is torch.ops.aten._foreach_copy_.default
        return result


@pytest.mark.parametrize("head", ["linear", "mlp", "v3"])
def test_keys_are_those_of_plain_autocast_to_the_bit(head):
    (query, key, keys), (other, plain_key, plain) = (make_keys(recast=recast, head=head) for recast in (True, False))
    for number in range(3):
        assert torch.equal(step(query, keys, number), step(other, plain, number))
    # Masters are in float32 and have moved alike, and so have the batch statistics.
    for (name, one), (_, two) in zip(key.state_dict().items(), plain_key.state_dict().items(), strict=True):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name
    assert all(parameter.dtype == torch.float32 for parameter in key.parameters())


def test_weights_are_cast_once_per_step_and_not_per_forward():
    query, key, keys = make_keys(recast=True)
    _, _, plain = make_keys(recast=False)
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8)
    found = {}
    for name, each in (("recast", keys), ("plain", plain)):
        with CastsOfWeights() as casts:
            each.advance({"momentum": 0.9})
            each(None, images, torch.arange(4))
            each(None, images, torch.arange(4))
        found[name] = casts.num
    num_layers = sum(isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) for layer in key.modules())
    assert found["plain"]["single"] - found["recast"]["single"] == 2 * num_layers
    assert (found["recast"]["together"], found["plain"]["together"]) == (1, 0)
    del query


def test_the_weights_are_back_after_an_error():
    _, key, keys = make_keys(recast=True)
    before = dict(key.named_parameters())
    with pytest.raises(RuntimeError):
        keys(None, torch.zeros(4, 5, 24, 24, dtype=torch.uint8), torch.arange(4))
    assert all(parameter is before[name] for name, parameter in key.named_parameters())


def test_a_compiled_key_encoder_is_not_compiled_again():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    query, _, keys = make_keys(recast=True, backend=count)
    other, _, plain = make_keys(recast=False)
    for number in range(3):
        assert torch.equal(step(query, keys, number), step(other, plain, number))
        if number == 0:
            first = len(graphs)
    assert len(graphs) == first > 0


class Standardized(nn.Conv2d):
    """Computes with its weight in float32 before it convolves."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


def test_a_layer_that_computes_with_its_weight_keeps_it_in_float32():
    torch.manual_seed(0)
    module = nn.Sequential(Standardized(3, 8, 3), nn.Conv2d(8, 4, 3)).requires_grad_(False)
    images = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(images)
        with RecastWeights(module, torch.bfloat16).in_use():
            assert [layer.weight.dtype for layer in module] == [torch.float32, torch.bfloat16]
            assert torch.equal(module(images), expected)
