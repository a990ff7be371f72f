"""Steps on batches that were held back: what they tell, and that a run does not notice."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.config import CheckpointConfig, Config
from moco_fast.encoders import encoder as encoders
from moco_fast.training.gauges import PendingTimes
from moco_fast.training.headspace import PendingHeadspace, describe
from moco_fast.training.loop import train
from moco_fast.training.supply import Supply
from pipelines.config import VIEWS, DataConfig
from pipelines.loader import open_loader
from tests.moco_fast.small_runs import small_run
from tests.moco_fast.tiny_encoder import TinyEncoder


def test_batches_that_are_held_back_come_in_their_order(packed_demo) -> None:
    data = DataConfig(shards=str(packed_demo.train), batch_size=96, backend="dali", num_threads=1)
    with open_loader(data, VIEWS["cifar10"]) as loader:
        wanted = [batch for _ in range(3) for batch in loader]
        places = []
    with open_loader(data, VIEWS["cifar10"]) as loader:
        supply = Supply(loader)
        found = []
        for number in range(len(wanted)):
            if number == 1:
                for _ in range(4):  # beyond the epoch's end
                    assert supply.hold() == 2 * 96 * 3 * 32 * 32
            places.append(supply.state_dict())
            found.append(next(supply))
    assert places == [{"epoch": number // 3, "step": number % 3} for number in range(9)]
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(*pair) for pair in zip(one.views, other.views, strict=True))
        assert [view.stride() for view in one.views] == [view.stride() for view in other.views]


def test_a_measurement_compares_the_steps_and_the_loader() -> None:
    beside, alone = PendingTimes([(0.0, 2.0)] * 8), PendingTimes([(0.0, 1.5)] * 8)
    found = PendingHeadspace(beside=beside, alone=alone, fetch_s=0.5, pause_s=4.0, host_cpu_share=0.31).wait()
    assert found == {
        "headspace/data_cost_share": 0.25,
        "headspace/loader_ratio": 3.0,
        "headspace/step_s": 1.5,
        "headspace/pause_s": 4.0,
        "headspace/host_cpu_share": 0.31,
    }
    assert describe(found) == (
        "headspace: data costs 25% of the step; alone, the loader is 3.0 times as fast as it; host CPU at 31%"
    )
    assert describe({"loss": 1.0}) is None


def run_of(shards: Path, out: Path, *, headspace: int | None) -> Config:
    config = small_run(shards, out, steps=26)
    return replace(
        config,
        data=replace(config.data, backend="dali"),
        log=replace(config.log, headspace=headspace, every_steps=5),
        checkpoint=CheckpointConfig(every_steps=14, keep=3),
    )


def tensors(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.find_newest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000026"
    saved = checkpoint.load(newest)
    return {**saved.model, **saved.optimizer, **saved.rng}


def of_two_ranks(*places: str, headspace: int | None) -> int:
    from accelerate.state import AcceleratorState

    shards, out = map(Path, places)
    config = run_of(shards, out, headspace=headspace)
    encoders.ENCODERS["tiny"] = TinyEncoder
    try:
        return train(replace(config, model=replace(config.model, encoder="tiny")))
    finally:
        del encoders.ENCODERS["tiny"]
        AcceleratorState._reset_state(reset_partial_state=True)


def without(*places: str) -> int:
    return of_two_ranks(*places, headspace=None)


def measuring(*places: str) -> int:
    return of_two_ranks(*places, headspace=10)


def test_two_ranks_that_measure_are_bit_equal_and_name_their_hosts(
    packed_demo, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    for name, run in (("plain", without), ("measured", measuring)):
        assert run_ranks(run, str(packed_demo.train), str(tmp_path / name)) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "measured" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "headspace/data_cost_share" in line] == [25]
    wanted = tensors(tmp_path / "plain")
    assert {"0.cpu", "1.cpu"} <= wanted.keys()
    assert [name for name, each in tensors(tmp_path / "measured").items() if not torch.equal(each, wanted[name])] == []
    environment = json.loads((tmp_path / "measured/environment.json").read_text())
    assert (environment["hosts"], environment["world_size"]) == ([os.uname().nodename] * 2, 2)
    [start] = map(json.loads, (tmp_path / "measured/starts.jsonl").read_text().splitlines())
    assert start["hosts"] == environment["hosts"]


def test_a_run_that_measures_is_bit_equal_even_if_it_is_stopped_meanwhile(
    packed_demo, fresh_accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, headspace in (("plain", None), ("measured", 10)):
        assert train(run_of(packed_demo.train, tmp_path / name, headspace=headspace)) == 0
    lines = [json.loads(line) for line in (tmp_path / "measured" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "headspace/data_cost_share" in line]
    assert [line["step"] for line in found] == [25]  # held after step 10, used up with step 22
    assert found[0]["headspace/loader_ratio"] > 0
    assert found[0]["headspace/step_s"] > 0
    assert capsys.readouterr().err.count("headspace: data costs") == 1
    wanted = tensors(tmp_path / "plain")
    assert [name for name, each in tensors(tmp_path / "measured").items() if not torch.equal(each, wanted[name])] == []
    # Its checkpoint of step 14 was written while eight batches were held back.
    shutil.rmtree(tmp_path / "measured" / "checkpoints" / "step-00000026")
    assert train(run_of(packed_demo.train, tmp_path / "measured", headspace=10)) == 0
    assert [name for name, each in tensors(tmp_path / "measured").items() if not torch.equal(each, wanted[name])] == []
