"""Half precision with loss scaling, by the same calls as on a GPU; the scaler's device is all that differs."""

import math
from types import SimpleNamespace

import pytest
import torch

from moco_fast.config import ModelConfig, OptimConfig, RunConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.methods.shuffle import Together
from moco_fast.optimizers.optim import build_optimizer, optimizer_tensors
from moco_fast.training.metrics import Average
from moco_fast.training.runtime import start
from moco_fast.training.step import TrainStep
from tests.batches import random_batch

BATCH = 8


@pytest.fixture
def half_runtime(fresh_accelerator, monkeypatch):
    """A runtime in float16. Accelerate scales losses on a GPU only, so it is told that it may."""
    runtime = start(RunConfig(device="cpu", precision="fp32"), env={})
    monkeypatch.setattr(runtime.accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(runtime.accelerator, "native_amp", True)
    monkeypatch.setattr(runtime.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
    return runtime


def make_batch(number):
    return random_batch(number, BATCH, 24)


def make_parts(runtime, *, optimizer="sgd", clip_norm=None):
    torch.manual_seed(0)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast(dim=8))
    query.to(memory_format=torch.channels_last)
    key = copy_as_key_encoder(query)
    bare = build_optimizer(query, OptimConfig(name=optimizer))
    queue = Queue(8, 64, torch.Generator().manual_seed(1))
    step = TrainStep(
        query=runtime.wrap_model(query, backwards_per_step=1),
        objective=Discrimination(
            keys=MomentumKeys(key, MomentumUpdate(query, key), Together(), runtime.autocast),
            dictionary=queue,
            temperature=0.2,
        ),
        optimizer=runtime.wrap_optimizer(bare),
        clip_norm=clip_norm,
        autocast=runtime.autocast,
        backward=runtime.backward,
        unscale=runtime.unscale,
    )
    return SimpleNamespace(step=step, query=query, key=key, queue=queue, optimizer=bare)


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_float16_with_loss_scaling_follows_float32(half_runtime, clip_norm):
    half = make_parts(half_runtime, clip_norm=clip_norm)
    ours = half.step([make_batch(0)], lr=0.1, scheduled={"momentum": 0.9})
    half_runtime.accelerator.scaler = None
    half_runtime.accelerator.native_amp = False
    full = make_parts(half_runtime, clip_norm=clip_norm)
    expected = full.step([make_batch(0)], lr=0.1, scheduled={"momentum": 0.9})
    assert ours["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)
    assert ours["loss"].item() != expected["loss"].item()
    assert ours["grad_norm"].item() == pytest.approx(expected["grad_norm"].item(), rel=0.1)  # that is, unscaled
    start = weights(make_parts(half_runtime).query)
    moved, should = (
        torch.cat([(w[n] - start[n]).flatten() for n in start]) for w in map(weights, (half.query, full.query))
    )
    assert (moved - should).norm() < 0.2 * should.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_gradient_that_overflows_skips_its_step_and_nothing_is_poisoned(half_runtime, optimizer):
    # Fused kernels are told of the overflow; the others are not called at all.
    scaler = half_runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-10)
    parts = make_parts(half_runtime, optimizer=optimizer)
    parts.key.get_parameter("head.0.bias").data.fill_(1.0)
    before = weights(parts.query)
    watched = parts.step([make_batch(0)], lr=0.1, scheduled={"momentum": 0.9})
    assert not watched["grad_norm"].isfinite()
    assert watched["loss"].isfinite()
    assert scaler.get_scale() == 2.0**20
    assert all(torch.equal(value, before[name]) for name, value in weights(parts.query).items())
    assert all(not value.any() for value in optimizer_tensors(parts.optimizer, parts.query).values())
    # The keys were fine: the dictionary has them, and the key encoder has moved as before every step.
    assert parts.queue.position.item() == BATCH
    assert parts.queue.keys.isfinite().all()
    assert parts.key.get_parameter("head.0.bias").max() < 1.0
    for number in range(1, 4):
        watched = parts.step([make_batch(number)], lr=0.1, scheduled={"momentum": 0.9})
    assert watched["grad_norm"].isfinite()
    assert not torch.equal(weights(parts.query)["head.0.weight"], before["head.0.weight"])
    assert all(value.isfinite().all() for value in parts.query.state_dict().values())


def test_an_overflow_does_not_spoil_the_averages():
    average = Average(("loss", "grad_norm"), torch.device("cpu"), may_overflow=("grad_norm",))
    for loss, grad_norm in ((1.0, 4.0), (2.0, math.inf), (3.0, 8.0)):
        average.add({"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)})
    assert average.sums.isfinite().all()
    assert average.take().wait() == {"loss": 2.0, "grad_norm": 6.0}
    average.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.nan)})
    only_skipped = average.take().wait()
    assert only_skipped["loss"] == 1.0
    assert math.isnan(only_skipped["grad_norm"])
