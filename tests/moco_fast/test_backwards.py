"""DDP is prepared for as many backward passes as a step of the recipe has, whoever builds the recipe's parts."""

import os
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from moco_fast.bench.clock import PartClock
from moco_fast.bench.parts import on_a_clock
from moco_fast.config import BatchNormConfig, ModelConfig, OptimConfig
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam
from moco_fast.presets import PRESETS
from moco_fast.training.build import build
from moco_fast.training.runtime import start
from tests.batches import random_batch

METHODS = {
    "queue": MomentumContrast(dim=16, queue_size=64),
    "symmetric": MomentumContrast(dim=16, queue_size=64, symmetric=True),
    "v3": MomentumContrastV3(dim=16, mlp_dim=32),
    "end-to-end": EndToEnd(dim=16),
    "bank": MemoryBank(dim=16, num_negatives=8),
    "byol": Byol(dim=16, mlp_dim=32),
    "simsiam": SimSiam(dim=16, predictor_dim=8),
}
BATCH = 8


def steps(shards, method, accumulate):
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    base = PRESETS["demo"][1]
    config = replace(
        base,
        data=replace(base.data, shards=shards, batch_size=2 * BATCH),
        views=replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=method,
        bn=BatchNormConfig(policy="sync" if "sync" in method.bn_policies[:1] else "auto"),
        optim=OptimConfig(lr=0.01, accumulate=accumulate),
        run=replace(base.run, device="cpu", precision="fp32"),
    )
    try:
        runtime = start(config.run)
        parts = build(config, runtime)
        with closing(parts.loader):
            watched = []
            for step in range(3):
                batches = [batch(10 * step + number, runtime.rank) for number in range(accumulate)]
                watched.append(parts.train_step(batches, lr=0.01, scheduled=method.scheduled(step, 3))["loss"].item())
            # As `moco-fast bench` takes its steps.
            clock = PartClock(runtime.device)
            with on_a_clock(parts.train_step, parts.optimizer, clock) as step_on_a_clock:
                watched.append(step_on_a_clock(batches, lr=0.01, scheduled=method.scheduled(2, 3))["loss"].item())
            assert {"query forward", "loss", "backward", "optimizer"} <= clock.read().keys()
            weights = [parameter.detach().double().sum().item() for parameter in parts.query.parameters()]
            return type(parts.train_step.query).__name__, watched, weights
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def batch(number, rank):
    return random_batch(100 * rank + number, BATCH, 32)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_same_steps(run_ranks, packed_demo, name, accumulate):
    ranks = run_ranks(steps, str(packed_demo.train), METHODS[name], accumulate)
    assert [kind for kind, _, _ in ranks] == ["DistributedDataParallel"] * 2
    assert all(torch.tensor(losses).isfinite().all() for _, losses, _ in ranks)
    assert ranks[0][2] == ranks[1][2], "gradients are averaged over ranks"
