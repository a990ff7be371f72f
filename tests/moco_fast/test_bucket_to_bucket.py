"""A run without a disk of its own: packed from bucket to bucket, read through a small cache, saved in a bucket."""

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.config import CheckpointConfig, Config
from moco_fast.training.loop import train
from moco_fast.training.state import read_lines
from moco_fast.training.step import TrainStep
from shards import PackConfig, pack
from shards.storage.stores import Folder
from tests.moco_fast.small_runs import small_run
from tests.moco_fast.test_signals import at_call, send

SHARD_SAMPLES, STEPS = 6, 24


def tensors(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.find_newest(out / "checkpoints")
    assert newest is not None
    saved = checkpoint.load(newest)
    assert saved.step == STEPS
    return {**saved.model, **saved.optimizer, **saved.rng}


@pytest.mark.slow
@pytest.mark.faults
def test_buckets_alone_give_the_run_that_a_disk_gives(
    bucket: str, packed_demo: Any, tmp_path: Path, fresh_accelerator: Any
) -> None:
    images = packed_demo.images / "train"
    source = Folder(f"{bucket}/images")
    for path in sorted(images.rglob("*.jpg")):
        source.put(path.relative_to(images).as_posix(), path)
    for sources, out in ((f"{bucket}/images", f"{bucket}/shards"), (str(images), str(tmp_path / "shards"))):
        pack(PackConfig(sources=(sources,), out=out, shard_samples=SHARD_SAMPLES, work_folder=str(tmp_path), workers=1))
    sizes = [size for name, size in Folder(f"{bucket}/shards").objects() if name.endswith(".tar")]
    # Below what an epoch reads, and enough for the shards of a window and the steps ahead.
    budget = sum(sizes) * 2 // 3

    def config(shards: str, out: str, *, mirror: str | None = None) -> Config:
        whole = small_run(Path("unset"), tmp_path / out, steps=STEPS)
        data = dataclasses.replace(
            whole.data,
            shards=shards,
            cache=str(tmp_path / "cache"),
            cache_gib=budget / (1 << 30),
            lanes=1,
            window_shards=2,
        )
        saved = CheckpointConfig(every_steps=6, mirror=mirror)
        return dataclasses.replace(whole, data=data, checkpoint=saved)

    assert train(config(str(tmp_path / "shards"), "on-disk")) == 0
    mirror = f"{bucket}/runs/first"
    # The machine is taken away in the tenth step, with its run and its cache.
    put_back = at_call(TrainStep, "__call__", 10, send(signal.SIGTERM))
    try:
        assert train(config(f"{bucket}/shards", "lost", mirror=mirror)) == 128 + signal.SIGTERM
    finally:
        put_back()
    shutil.rmtree(tmp_path / "lost")
    shutil.rmtree(tmp_path / "cache")
    assert train(config(f"{bucket}/shards", "elsewhere", mirror=mirror)) == 0
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
    assert 0 < cached <= budget
    of_disk, of_buckets = tensors(tmp_path / "on-disk"), tensors(tmp_path / "elsewhere")
    assert of_disk.keys() == of_buckets.keys()
    assert [name for name in of_disk if not torch.equal(of_disk[name], of_buckets[name])] == []
    losses = [
        {line["step"]: line["loss"] for line in read_lines(tmp_path / out / "metrics.jsonl")}
        for out in ("on-disk", "elsewhere")
    ]
    assert losses[0] == losses[1]
    assert f"step-{STEPS:08d}" in {name.split("/")[1] for name, _ in Folder(mirror).objects() if "step-" in name}
