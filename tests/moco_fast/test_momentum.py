import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3

SMALL = ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast(dim=8)


def pair(memory_format=torch.channels_last):
    query = build_encoder(*SMALL).to(memory_format=memory_format)
    key = copy_as_key_encoder(query)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.randn_like(parameter))
    return query, key


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 0.9999, 1.0])
def test_update_is_the_papers_equation(momentum):
    query, key = pair()
    before = {name: parameter.detach().numpy().copy() for name, parameter in key.named_parameters()}
    MomentumUpdate(query, key)(momentum)
    for name, parameter in key.named_parameters():
        q = query.get_parameter(name).detach().numpy().astype(np.float64)
        expected = momentum * before[name].astype(np.float64) + (1 - momentum) * q
        np.testing.assert_allclose(parameter.numpy(), expected, rtol=2e-6, atol=2e-7, err_msg=name)


def test_many_small_steps_are_not_lost_to_rounding():
    query, key = pair()
    update = MomentumUpdate(query, key)
    start = {name: parameter.detach().double() for name, parameter in key.named_parameters()}
    for _ in range(1000):
        update(0.999)
    for name, parameter in key.named_parameters():
        q = query.get_parameter(name).detach().double()
        expected = q + 0.999**1000 * (start[name] - q)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_copy_starts_equal_takes_no_gradient_and_shares_nothing():
    query = build_encoder(*SMALL).to(memory_format=torch.channels_last)
    key = copy_as_key_encoder(query)
    for name, parameter in query.named_parameters():
        copied = key.get_parameter(name)
        assert torch.equal(parameter, copied)
        assert parameter.stride() == copied.stride()
        assert parameter.data_ptr() != copied.data_ptr()
        assert not copied.requires_grad
        assert parameter.requires_grad
    assert query.state_dict().keys() == key.state_dict().keys()


def test_the_predictor_is_the_querys_alone():
    query = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrastV3(dim=4, mlp_dim=8))
    key = copy_as_key_encoder(query)
    assert key.predictor is None
    assert query.predictor is not None
    with torch.no_grad():
        query.head[0].weight.add_(1)
    MomentumUpdate(query, key)(0.0)
    assert torch.equal(key.head[0].weight, query.head[0].weight)


def test_buffers_stay_each_encoders_own():
    query, key = pair()
    query.backbone.bn1.running_mean.fill_(3.0)
    MomentumUpdate(query, key)(0.5)
    assert (key.backbone.bn1.running_mean == 0).all()


def test_what_would_average_badly_is_refused():
    query, key = pair()
    with pytest.raises(AssertionError, match="bfloat16"):
        MomentumUpdate(query, key.to(torch.bfloat16))
    with pytest.raises(AssertionError, match="different strides"):
        MomentumUpdate(query, pair(torch.contiguous_format)[1])
    with pytest.raises(AssertionError, match="lacks"):
        MomentumUpdate(nn.Linear(2, 2), key)
