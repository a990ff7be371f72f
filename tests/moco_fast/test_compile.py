"""torch.compile for every preset: the published parts, around encoders small enough for a test."""

import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moco_fast import distributed
from moco_fast.config import Config, RunConfig
from moco_fast.encoders.encoder import ENCODERS, Encoder
from moco_fast.methods.base import Method
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.shuffle import Together
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.presets import PRESETS
from moco_fast.training.build import build
from moco_fast.training.runtime import start
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch
from tests.batches import random_batch

BATCH = 8
SIZE = 32


class TinyCnn(nn.Sequential):
    """A layer of what a ResNet is made of."""

    num_features = 4

    def __init__(self) -> None:
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), pool)


TINY = {
    "resnet50": TinyCnn,
    "resnet18_half": TinyCnn,
    "resnet18": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 4, 8, 8), stem_width=4),
    "vit_small": lambda img_size: VisionTransformer(
        img_size=img_size, patch_size=16, embed_dim=12, depth=1, num_heads=2, num_classes=0
    ),
}
TINY["vit_base"] = TINY["vit_small"]


def small(method: Method) -> Method:
    sizes = {"dim": 8, "mlp_dim": 16, "predictor_dim": 4, "queue_size": 24, "num_negatives": 24}
    return replace(method, **{name: size for name, size in sizes.items() if hasattr(method, name)})


def tiny(preset: Config, shards: str) -> Config:
    # The tiny ResNet alone has scales that can start at zero.
    encoder = "resnet18" if preset.model.zero_init_residual else preset.model.encoder
    return replace(
        preset,
        data=replace(preset.data, shards=shards, batch_size=BATCH, backend="dali", num_threads=1),
        views=replace(preset.views, size=SIZE),
        model=replace(preset.model, encoder=encoder),
        method=small(preset.method),
        bn=replace(preset.bn, num_groups=2),
        run=RunConfig(steps=2, device="cpu", precision="fp32"),
    )


def make_batch(number: int) -> Batch:
    return random_batch(number, BATCH, SIZE)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in PRESETS), ("moco-v2", "bf16")])
def test_every_preset_trains_the_same_compiled(packed_demo, monkeypatch, name, precision):
    for encoder, build_tiny in TINY.items():
        monkeypatch.setitem(ENCODERS, encoder, build_tiny)
    config = tiny(PRESETS[name][1], str(packed_demo.train))
    config = replace(config, run=replace(config.run, precision=precision))
    close = {"rtol": 1e-3, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.01}
    watched, ends = {}, {}
    for backend in ("NO", "AOT_EAGER"):
        torch.compiler.reset()
        runtime = start(config.run, env={"ACCELERATE_DYNAMO_BACKEND": backend})
        assert runtime.compile == (backend != "NO")
        parts = build(config, runtime)
        try:
            torch.manual_seed(1)  # the memory bank draws its negatives
            watched[backend] = [
                parts.train_step([make_batch(step)], lr=1e-3, scheduled=config.method.scheduled(step, 20))
                for step in range(2)
            ]
            ends[backend] = parts.query.state_dict()
        finally:
            parts.loader.close()
    for eager, compiled in zip(*watched.values(), strict=True):
        torch.testing.assert_close(compiled, eager, **close)
    torch.testing.assert_close(ends["AOT_EAGER"], ends["NO"], **close)


def make_small_step() -> tuple[TrainStep, Encoder, Encoder]:
    torch.manual_seed(0)
    query = Encoder(TinyCnn(), nn.Linear(4, 8), feature_dim=4, dim=8).to(memory_format=torch.channels_last)
    key = copy_as_key_encoder(query)
    objective = Discrimination(
        keys=MomentumKeys(key, MomentumUpdate(query, key), Together(), nullcontext),
        dictionary=Queue(8, 24, torch.Generator().manual_seed(0)),
        temperature=0.2,
    )
    step = TrainStep(query=query, objective=objective, optimizer=build_optimizer(query, PRESETS["moco-v2"][1].optim))
    return step, query, key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_inductors_code_trains_the_same():
    torch.compiler.reset()
    eager, query, _ = make_small_step()
    compiled, compiled_query, compiled_key = make_small_step()
    for encoder in (compiled_query, compiled_key):
        # What --run.cuda-graphs asks for; on a CPU there are no graphs, and the rest is the same.
        encoder.compile(backend="inductor", mode="reduce-overhead")
    for number in range(3):
        ours, expected = (step([make_batch(number)], lr=0.1, scheduled={"momentum": 0.9}) for step in (compiled, eager))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(compiled_query.state_dict(), query.state_dict(), rtol=1e-3, atol=1e-5)


def step_with_statistics_of_all_ranks(compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    encoder = TinyCnn()
    use_statistics_of_all_ranks(encoder)
    if compiled:
        encoder.compile(backend="aot_eager")
    images = make_batch(distributed.rank()).views[0].float()
    losses = []
    # Torch looks for gradients of what it goes on with, and hides the warning of that in its own way.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        for _ in range(2):
            loss = encoder(images).square().sum()
            loss.backward()
            losses.append(loss.item())
    return losses, {name: parameter.grad for name, parameter in encoder.named_parameters()} | dict(
        encoder.named_buffers()
    )


@pytest.mark.slow
def test_synchronized_statistics_are_the_same_compiled(run_ranks):
    for ours, expected in zip(
        *(run_ranks(step_with_statistics_of_all_ranks, how) for how in (True, False)), strict=True
    ):
        torch.testing.assert_close(ours, expected)
