import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from moco_fast import distributed
from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.batchnorm import average_batch_statistics, use_group_statistics
from moco_fast.methods.momentum import copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast

LAYERS = {
    "torch 2d": lambda: nn.BatchNorm2d(6),
    "torch 2d without scales": lambda: nn.BatchNorm2d(6, affine=False),
    "torch 2d without running statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "timm with activation": lambda: BatchNormAct2d(6, act_layer=nn.ReLU),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_statistics_are_those_of_each_group_alone(layer, memory_format):
    layer = layer()
    alone = [copy.deepcopy(layer) for _ in range(3)]
    inputs = (torch.randn(12, 6, 4, 4) * 3 + 1).contiguous(memory_format=memory_format)
    grads = torch.randn(12, 6, 4, 4)
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    use_group_statistics(layer, 3)
    outputs = layer(one)
    expected = torch.cat([each(part) for each, part in zip(alone, other.chunk(3), strict=True)])
    torch.testing.assert_close(outputs, expected)
    assert outputs.is_contiguous(memory_format=memory_format)
    outputs.backward(grads)
    expected.backward(grads)
    torch.testing.assert_close(one.grad, other.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(each.get_parameter(name).grad for each in alone))
    if layer.running_mean is not None:
        torch.testing.assert_close(layer.running_mean, sum(each.running_mean for each in alone) / 3)
        torch.testing.assert_close(layer.running_var, sum(each.running_var for each in alone) / 3)
        assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_evaluation_and_state_are_those_of_the_layer_itself(layer):
    plain = layer()
    if plain.running_mean is not None:
        plain.running_mean.normal_()
    converted = copy.deepcopy(plain)
    use_group_statistics(converted, 2)
    assert plain.state_dict().keys() == converted.state_dict().keys()
    inputs = torch.randn(5, 6, 3, 3)
    torch.testing.assert_close(converted.eval()(inputs), plain.eval()(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18_quarter", "efficientnet_b0"])
def test_converted_encoders_can_be_copied_and_keep_groups_apart(name):
    encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(dim=4))
    use_group_statistics(encoder, 2)
    key = copy_as_key_encoder(encoder)
    for layer in key.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    first, second, other = torch.randn(3, 4, 3, 64, 64)
    with torch.no_grad():
        before, after = (key(torch.cat([first, rest]))[:4] for rest in (second, other))
    torch.testing.assert_close(before, after)


def test_a_batch_norm_that_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="1 is a SyncBatchNorm"):
        use_group_statistics(nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(3)), 2)


def average_statistics():
    layer = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    layer[1].running_mean.fill_(distributed.rank() + 1)
    layer[1].running_var.fill_(10 * distributed.rank())
    layer[1].num_batches_tracked.fill_(7)
    weights = [parameter.detach().clone() for parameter in layer.parameters()]
    average_batch_statistics(layer)
    assert all(torch.equal(before, after) for before, after in zip(weights, layer.parameters(), strict=True))
    return layer[1].running_mean, layer[1].running_var, layer[1].num_batches_tracked


def test_average_batch_statistics(run_ranks):
    for mean, variance, num_batches in run_ranks(average_statistics):
        assert (mean == 1.5).all()
        assert (variance == 5).all()
        assert num_batches == 7
