"""DDP is prepared for as many backward passes as a step of the recipe has, whoever builds the recipe's parts."""

import os
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from moco_fast.config import MocoConfig, ModelConfig, OptimConfig
from moco_fast.presets import PRESETS
from moco_fast.training.build import build
from moco_fast.training.runtime import start
from tests.batches import random_batch

MECHANISMS = {
    "queue": MocoConfig(queue_size=64),
    "symmetric": MocoConfig(queue_size=64, loss="symmetric"),
    "v3": MocoConfig(dictionary="batch", loss="v3"),
    "end-to-end": MocoConfig(dictionary="batch", key_encoder="query"),
    "bank": MocoConfig(dictionary="bank", queue_size=8),
}
BATCH = 8


def steps(shards, moco, accumulate):
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    base = PRESETS["demo"][1]
    config = replace(
        base,
        data=replace(base.data, shards=shards, batch_size=2 * BATCH),
        views=replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter", head="v3" if moco.loss == "v3" else "mlp", mlp_dim=32, dim=16),
        moco=moco,
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
                watched.append(parts.train_step(batches, lr=0.01, momentum=0.9)["loss"].item())
            weights = [parameter.detach().double().sum().item() for parameter in parts.query.parameters()]
            return type(parts.train_step.query).__name__, watched, weights
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def batch(number, rank):
    return random_batch(100 * rank + number, BATCH, 32)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_two_ranks_take_the_same_steps(run_ranks, packed_demo, mechanism, accumulate):
    ranks = run_ranks(steps, str(packed_demo.train), MECHANISMS[mechanism], accumulate)
    assert [name for name, _, _ in ranks] == ["DistributedDataParallel"] * 2
    assert all(torch.tensor(losses).isfinite().all() for _, losses, _ in ranks)
    assert ranks[0][2] == ranks[1][2], "gradients are averaged over ranks"
