"""A world of one rank, as `accelerate launch` starts it: NCCL on a GPU (gloo on a CPU), and gloo beside it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.gpu

IN_THE_WORLD = """
import json, sys
import torch, torch.distributed as dist
if {fake}:
    from tests import fake_cuda
    fake_cuda.install()
from dataclasses import replace
from moco_fast import distributed
from moco_fast.bench.loading import resident_batch
from moco_fast.training.build import build
from moco_fast.config import ModelConfig
from moco_fast.presets import PRESETS
from moco_fast.training.runtime import start
from moco_fast.methods.shuffle import exchange_group
from moco_fast.stop import StopSignal

base = PRESETS["moco-v2"][1]
config = replace(
    base,
    data=replace(base.data, shards={shards!r}, batch_size=16, backend="dali"),
    views=replace(base.views, size=32),
    model=ModelConfig(encoder="resnet18_quarter"),
    method=replace(base.method, dim=16, queue_size=64, symmetric={symmetric}),
    run=replace(base.run, device={device!r}, precision="fp32"),
)
runtime = start(config.run)
if {device!r} == "cuda":
    # accelerate leaves a single rank without DDP.
    type(runtime.accelerator).multi_device = property(lambda _: True)
parts = build(config, runtime)
parts.loader.close()
stop = StopSignal(timeout_s=60)
batch = resident_batch(config, runtime, 16, runtime.device)
losses = []
for _ in range(3):
    losses.append(parts.train_step([batch], lr=0.01, scheduled={{"momentum": 0.9}})["loss"])
    assert stop.poll() == 0
stop.close()

# What a world of one leaves out: the collectives of a step, as several ranks call them.
group, _ = dist.new_subgroups(group_size=1)
images = batch.views[1]
for each in (None, group):
    received = distributed._exchange(images, each)
    assert torch.equal(received, images) and received.stride() == images.stride()
rows = torch.randn(4, 3, device=runtime.device)
gathered = torch.empty_like(rows)
distributed._all_gather_into(gathered, rows)
assert torch.equal(gathered, rows)
for average in (True, False):
    distributed._flat_collective([rows], None, average=average)
assert torch.equal(gathered, rows)
assert runtime.tell_all("word") == "word" and runtime.gather(1) == [1]
runtime.wait_for_all()
found = {{
    "backend": dist.get_backend(),
    "wrapped": type(parts.train_step.query).__name__,
    "losses": [loss.item() for loss in losses],
}}
runtime.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    images = [jpeg(smooth_image(np.random.default_rng(number), 48, 40)) for number in range(40)]
    return write_shards(tmp_path_factory.mktemp("shards"), images)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_step_and_its_collectives(device, shards, symmetric):
    is_fake = "tests.fake_cuda" in sys.modules
    code = IN_THE_WORLD.format(fake=is_fake, shards=str(shards), symmetric=symmetric, device=device.type)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    world |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env = os.environ | world | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if device.type == "cuda":
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["backend"] == ("gloo" if is_fake else "nccl")
    assert all(0 < loss < 20 for loss in found["losses"])
