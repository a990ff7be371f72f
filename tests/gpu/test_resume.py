"""A run that is cut and continued on the device; with DEVICE=cpu, on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_fast import checkpoint
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = [jpeg(smooth_image(rng, 48, 40)) for _ in range(40)]
    return write_shards(tmp_path_factory.mktemp("shards"), images, per_shard=20)


def train(shards, out, device) -> str:
    words = ["moco-v2", "--data.shards", shards, "--data.batch-size", 16, "--data.lanes", 2, "--views.size", 32]
    words += ["--model.encoder", "resnet18_quarter", "--method.queue-size", 64, "--data.backend", "dali"]
    words += ["--run.out", out, "--run.steps", 5, "--run.device", device.type, "--run.precision", "fp32"]
    words += ["--checkpoint.every-steps", 2, "--checkpoint.keep", 3, "--log.every-steps", 1, "--log.trackers"]
    words += ["--run.deterministic"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "moco_fast.train", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(out) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_was_cut_ends_as_one_that_was_not(device, shards, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(shards, whole, device)
    shutil.copytree(whole, cut)
    # As a kill after step 2 leaves it, the middle of an epoch of three steps.
    for step in (4, 5):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    assert f"continuing {cut} from step 2" in train(shards, cut, device)

    assert losses(cut) == losses(whole)
    ends = [checkpoint.load(out / "checkpoints" / "step-00000005") for out in (whole, cut)]
    for one, other in ((ends[0].model, ends[1].model), (ends[0].optimizer, ends[1].optimizer)):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert ends[0].numbers["loader"] == ends[1].numbers["loader"] == {"epoch": 2, "step": 1}
