"""The training step on the device; with DEVICE=cpu, all but the device."""

import copy
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from moco_fast.bench.clock import PartClock
from moco_fast.bench.parts import on_a_clock
from moco_fast.config import ModelConfig, OptimConfig, RunConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.batchnorm import use_group_statistics
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam
from moco_fast.methods.shuffle import Together, VirtualGroups
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.training.runtime import allow_tf32, start
from moco_fast.training.step import TrainStep
from tests.batches import random_batch
from tests.gpu.waiting import ABOUT_EMPTY_GRAPH, ABOUT_TF32, no_host_sync
from tests.leaks import NewTensors

pytestmark = pytest.mark.gpu

BATCH = 16
METHODS = {
    "queue": MomentumContrast(dim=16, queue_size=256),
    "symmetric": MomentumContrast(dim=16, queue_size=256, symmetric=True),
    "v3": MomentumContrastV3(dim=16, mlp_dim=32),
    "end-to-end": EndToEnd(dim=16),
    "bank": MemoryBank(dim=16, num_negatives=64),
    "byol": Byol(dim=16, mlp_dim=32),
    "simsiam": SimSiam(dim=16, predictor_dim=8),
}
OPTIMIZERS = ("sgd", "lars", "adamw", "lamb")


class Training:
    """A small training on a device, from weights that are the same on all devices."""

    def __init__(self, device, *, method=METHODS["queue"], optimizer="sgd", num_groups=1, autocast=nullcontext):
        self.device = device
        torch.manual_seed(0)
        query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), method)
        if num_groups > 1:
            use_group_statistics(query, num_groups)
        self.query = query.to(device, memory_format=torch.channels_last)
        self.objective = method.build(
            Setting(
                query=self.query,
                policy=VirtualGroups(num_groups) if num_groups > 1 else Together(),
                autocast=autocast,
                num_samples=500,
                seed=1,
                device=device,
                available_bytes=1 << 30,
            )
        )
        self.step = TrainStep(
            query=self.query,
            objective=self.objective,
            optimizer=build_optimizer(self.query, OptimConfig(name=optimizer), constant_lr=method.constant_lr),
            clip_norm=1.0,
            autocast=autocast,
        )

    def batch(self, number):
        return random_batch(number, BATCH, 32, first=number * BATCH, device=self.device)

    def run(self, num_steps, start=0):
        batches = [self.batch(start + number) for number in range(num_steps)]
        return [self.step([batch], lr=0.01, scheduled={"momentum": 0.99}) for batch in batches]


@pytest.fixture(autouse=True)
def full_float32():
    """Without TF32, which would round the device's products to ten bits."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    allow_tf32(False)
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("num_groups", [1, 4])
def test_a_step_is_the_cpus(device, num_groups):
    ours, reference = (Training(where, num_groups=num_groups) for where in (device, torch.device("cpu")))
    for step in range(3):
        (watched,), (expected,) = (training.run(1, start=step) for training in (ours, reference))
        for name in ("loss", "similarity_positive", "feature_std", "grad_norm"):
            assert watched[name].item() == pytest.approx(expected[name].item(), rel=2e-3), (step, name)
    for name, value in reference.query.named_parameters():
        torch.testing.assert_close(ours.query.get_parameter(name).cpu(), value, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(
        ours.objective.modules["queue"].keys.cpu(), reference.objective.modules["queue"].keys, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "sgd") for name in METHODS), *(("queue", each) for each in OPTIMIZERS[1:])]
)
def test_the_host_never_waits_in_a_step(device, name, optimizer):
    training = Training(device, method=METHODS[name], optimizer=optimizer, num_groups=2)
    training.run(2)
    batch = training.batch(2)
    with no_host_sync(device):
        watched = training.step([batch, batch], lr=0.01, scheduled={"momentum": 0.99})
    assert watched["loss"].device == next(training.query.parameters()).device
    assert all(value.isfinite() for value in watched.values())


@pytest.fixture
def float16(device, fresh_accelerator, monkeypatch):
    """A runtime in float16. On a CPU, where accelerate scales no loss, it is told that it may."""
    on_gpu = device.type == "cuda"
    runtime = start(RunConfig(device=device.type, precision="fp16" if on_gpu else "fp32"), env={})
    if not on_gpu:
        monkeypatch.setattr(runtime.accelerator.state, "_mixed_precision", "fp16")
        monkeypatch.setattr(runtime.accelerator, "native_amp", True)
        monkeypatch.setattr(runtime.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
    yield runtime
    runtime.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_host_never_waits_for_the_scaler_of_float16(device, float16, optimizer):
    # A CPU takes a minute for a step in float16; scaling is the same in float32.
    autocast = float16.autocast if device.type == "cuda" else nullcontext
    training = Training(device, optimizer=optimizer, autocast=autocast)
    wrapped = float16.wrap_optimizer(training.step.optimizer)
    training.step = replace(training.step, optimizer=wrapped, backward=float16.backward, unscale=float16.unscale)
    before = training.query.get_parameter("head.0.weight").detach().clone()
    training.run(2)
    batch = training.batch(2)
    with no_host_sync(device):
        watched = training.step([batch], lr=0.01, scheduled={"momentum": 0.99})
    assert watched["loss"].isfinite()
    assert float16.scaler_state()["scale"] > 0
    assert not torch.equal(training.query.get_parameter("head.0.weight"), before)


def test_measuring_the_parts_does_not_make_the_host_wait(device):
    training = Training(device, num_groups=2)
    training.run(2)
    batch, clock = training.batch(2), PartClock(device)
    started = time.perf_counter()
    with on_a_clock(training.step, training.step.optimizer, clock) as step:
        with no_host_sync(device), clock.part("rest"):
            step([batch], lr=0.01, scheduled={"momentum": 0.99})
        seconds = clock.read()
    assert seconds.keys() == {
        "momentum update", "key forward", "exchange", "query forward", "loss", "backward", "optimizer",
        "gather and enqueue", "rest",
    }  # fmt: skip
    assert 0 < sum(seconds.values()) <= time.perf_counter() - started


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_full_precision(device, dtype):
    half = Training(device, autocast=lambda: torch.autocast(device.type, dtype=dtype))
    full = Training(device)
    for ours, expected in zip(half.run(2), full.run(2), strict=True):
        assert ours["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05)
        assert ours["loss"].dtype == torch.float32
    assert {parameter.dtype for parameter in half.query.parameters()} == {torch.float32}


def test_memory_does_not_grow(device):
    training = Training(device)
    training.run(3)
    used, new = [], NewTensors()
    for number in range(3, 8):
        training.run(1, start=number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            used.append(torch.cuda.memory_allocated(device))
        else:
            used.append(new.count()[1])
    assert len(set(used)) == 1, used


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(f"ignore:{ABOUT_TF32}:UserWarning")
@pytest.mark.filterwarnings(f"ignore:{ABOUT_EMPTY_GRAPH}:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_encoders_give_the_same_losses(device, mode):
    # `reduce-overhead` is --run.cuda-graphs: steps enough to warm up, to record, and to replay more than once.
    compiled, eager = Training(device, num_groups=2), Training(device, num_groups=2)
    before = copy.deepcopy(compiled.query.state_dict())
    # The CPU's compiler takes minutes; its turn is only to show that the graph can be captured.
    options = {"backend": "inductor", "mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}
    for encoder in (compiled.query, compiled.objective.modules["key"]):
        encoder.compile(**options)
    num_steps = 6 if device.type == "cuda" else 2
    losses = [[watched["loss"].item() for watched in training.run(num_steps)] for training in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert compiled.query.state_dict().keys() == before.keys()
    torch.testing.assert_close(
        compiled.objective.modules["queue"].keys, eager.objective.modules["queue"].keys, rtol=0.05, atol=0.02
    )
