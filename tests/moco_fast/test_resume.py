"""Every method, cut after a checkpoint in mid-epoch: the rest of the run is that of one that was not, bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_fast import checkpoint
from moco_fast.config import BatchNormConfig, CheckpointConfig, Config, LogConfig, ModelConfig, RunConfig
from moco_fast.encoders.encoder import ENCODERS
from moco_fast.methods.registry import METHODS, method_class
from moco_fast.training.loop import train
from pipelines.config import DataConfig, ViewsConfig
from tests.moco_fast.tiny_encoder import TinyEncoder
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

NUM_STEPS, CUT_AFTER = 5, 2
SMALL = {"dim": 4, "mlp_dim": 6, "predictor_dim": 3, "queue_size": 24, "num_negatives": 12}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    images = [jpeg(smooth_image(rng, 20, 24)) for _ in range(24)]
    return write_shards(tmp_path_factory.mktemp("resume"), images, per_shard=12)


def configuration(name: str, shards: Path, out: Path) -> Config:
    cls = method_class(name)
    names = {field.name for field in dataclasses.fields(cls)}
    method = cls(**{option: value for option, value in SMALL.items() if option in names})
    grouped = "auto" in method.bn_policies
    return Config(
        data=DataConfig(shards=str(shards), batch_size=8, lanes=2, backend="dali", num_threads=1),
        views=ViewsConfig(size=16),
        model=ModelConfig(encoder="tiny"),
        method=method,
        bn=BatchNormConfig(num_groups=2) if grouped else BatchNormConfig(policy="sync"),
        run=RunConfig(device="cpu", precision="fp32", steps=NUM_STEPS, out=str(out)),
        checkpoint=CheckpointConfig(every_steps=CUT_AFTER, keep=3),
        log=LogConfig(every_steps=1, trackers=()),
    )


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", METHODS)
def test_a_resume_is_bit_equal(name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(configuration(name, shards, whole)) == 0
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints").glob("step-*"):
        if checkpoint.load(path).step > CUT_AFTER:
            shutil.rmtree(path)
    torch.manual_seed(1234)  # what this process drew in between is not what the run goes on with
    assert train(configuration(name, shards, cut)) == 0

    assert losses(cut) == losses(whole)
    assert [step for step, _ in losses(cut)] == list(range(1, NUM_STEPS + 1))
    ends = [checkpoint.load(out / "checkpoints" / f"step-{NUM_STEPS:08d}") for out in (whole, cut)]
    for kind in ("model", "optimizer", "rng"):
        one, other = (getattr(end, kind) for end in ends)
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], kind
    assert ends[0].numbers["loader"] == ends[1].numbers["loader"] == {"epoch": 1, "step": 2}
