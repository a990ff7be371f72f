"""A loss that is not finite: what the run leaves, and what a replay of it says."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast import checkpoint, distributed
from moco_fast.cli import main
from moco_fast.config import CheckpointConfig, Config
from moco_fast.encoders import encoder as encoders
from moco_fast.training.capture import read_capture, read_generators
from moco_fast.training.loop import train
from moco_fast.training.replay import replay
from pipelines.loader import Loader
from tests.moco_fast.small_runs import small_run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Fragile(nn.Sequential):
    """A backbone whose second convolution cannot bear a sample that is marked by a white corner."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), Second(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Second(nn.Conv2d):
    poisoned = False

    def __init__(self) -> None:
        super().__init__(4, 4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = super().forward(inputs)
        return out * math.nan if Second.poisoned else out


@pytest.fixture(autouse=True)
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.ENCODERS, "fragile", Fragile)
    monkeypatch.setattr(Second, "poisoned", False)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of a sample whose batch makes the backbone fail, from its second epoch on."""
    sample = 7
    handed_over = Loader._next

    def next_batch(self: Loader) -> Any:
        batch = handed_over(self)
        Second.poisoned = self._epoch == 1 and sample in batch.index
        return batch

    monkeypatch.setattr(Loader, "_next", next_batch)
    return sample


def run_of(shards: Path, out: Path, **optim: Any) -> Config:
    config = small_run(shards, out, steps=60)
    return replace(
        config,
        data=replace(config.data, backend="dali", batch_size=96),
        model=replace(config.model, encoder="fragile"),
        checkpoint=CheckpointConfig(every_steps=2, keep=1),
        log=replace(config.log, every_steps=2, headspace=None),
        optim=replace(config.optim, **optim),
    )


def test_a_sample_that_makes_nan_is_found_again_in_its_module(
    packed_demo, poison: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"`moco-fast replay .*/run/capture` repeats the step"):
        train(run_of(packed_demo.train, out))
    capture = read_capture(out / "capture")
    [[indices]] = capture.indices
    assert poison in indices
    assert len(indices) == 96
    assert 4 <= capture.step <= 6  # three steps per epoch
    assert capture.place == {"epoch": 1, "step": capture.step - 4}
    assert (capture.ranks, capture.world_size, capture.from_step) == ((0,), 1, (capture.step - 1) // 2 * 2)
    assert math.isnan(capture.losses[0])
    assert checkpoint.find_newest(out / "capture" / "checkpoints") is not None
    assert set(read_generators(out / "capture")) == {"0.cpu"}
    capsys.readouterr()
    assert main(["replay", str(out / "capture"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    first = "the first value that is not finite: output of query.backbone.2"
    # Keys are computed first, by the key encoder.
    assert f"step {capture.step}, rank 0: {first.replace('query', 'key')}" in said
    assert "output of key.backbone.1" in said
    assert "others than those" not in said
    assert re.search(r"the losses of the last [12] steps are those of the run, bit for bit", said)
    # Without what made it fail, the same steps are finite.
    Second.poisoned = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Second, "forward", nn.Conv2d.forward)
        found = replay(out / "capture", device="cpu", say=print)
    assert (found.reproduced, found.same_batches, found.step) == (False, True, capture.step)
    assert found.first_other == capture.step


def poisoned_on_the_second_rank(*places: str, action: str) -> Any:
    """Train until the loss is not finite, or replay that."""
    from accelerate.state import AcceleratorState

    shards, out = map(Path, places)
    handed_over = Loader._next

    def next_batch(self: Loader) -> Any:
        batch = handed_over(self)
        Second.poisoned = self._epoch == 1 and distributed.rank() == 1
        return batch

    encoders.ENCODERS["fragile"] = Fragile
    Loader._next = next_batch
    try:
        if action == "replay":
            return replay(out / "capture", device="cpu", say=print)
        train(run_of(shards, out))
    except FloatingPointError as error:
        return str(error)
    finally:
        Loader._next = handed_over
        Second.poisoned = False
        del encoders.ENCODERS["fragile"]
        AcceleratorState._reset_state(reset_partial_state=True)


def trained(*places: str) -> Any:
    return poisoned_on_the_second_rank(*places, action="train")


def replayed(*places: str) -> Any:
    return poisoned_on_the_second_rank(*places, action="replay")


def test_two_ranks_leave_one_capture_and_replay_it_together(
    packed_demo: Any, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    places = str(packed_demo.train), str(tmp_path / "run")
    for said in run_ranks(trained, *places):
        assert "`moco-fast replay" in said
    capture = read_capture(tmp_path / "run/capture")
    assert (capture.step, capture.world_size, len(capture.indices), len(capture.observed)) == (4, 2, 2, 2)
    # Half of each rank's keys are computed on the other one.
    assert capture.ranks == (0, 1)
    assert all(map(math.isnan, capture.losses))
    assert set(read_generators(tmp_path / "run/capture")) == {"0.cpu", "1.cpu"}
    one, other = run_ranks(replayed, *places)
    assert one == other
    assert (one.step, one.rank, one.first) == (4, 1, "output of key.backbone.2")
    assert (one.same_batches, one.first_other) == (True, None)
    assert one.num_compared > 0


def test_a_rate_that_is_far_too_high_is_seen_in_the_weights(packed_demo, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"Lower --optim\.lr"):
        train(run_of(packed_demo.train, out, lr=1e38))
    capture = read_capture(out / "capture")
    assert capture.from_step == 0  # there was no checkpoint yet: it begins at the start
    found = replay(out / "capture", device="cpu", say=print)
    assert found.reproduced
    assert found.same_batches
    assert (found.num_compared, found.first_other) == (found.step, None)
    # One bit of a loss.
    values = json.loads((out / "capture/capture.json").read_text())
    loss = values["observed"][0]["1"][0]
    values["observed"][0]["1"][0] = float(np.nextafter(np.float32(loss), np.float32(9)))
    (out / "capture/capture.json").write_text(json.dumps(values))
    assert replay(out / "capture", device="cpu", say=print).first_other == 1
    assert found.step <= capture.step
    assert found.first is not None
    assert found.first.split(" of ")[0] in ("weights", "output", "loss", "gradient")
    assert any(value > 1e30 for _, value in found.before)


def test_other_samples_are_refused(packed_demo, poison: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        train(run_of(packed_demo.train, out))
    path = out / "capture" / "capture.json"
    values = json.loads(path.read_text())
    values["data"]["data.shards"]["digest"] = "0" * 32
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="holds other samples than when the step was captured"):
        replay(out / "capture", device="cpu", say=print)
    values["world_size"] = 2
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"accelerate launch --num_processes 2 -m moco_fast\.cli replay"):
        replay(out / "capture", device="cpu", say=print)
    path.write_text(json.dumps(values | {"version": 0}))
    with pytest.raises(ValueError, match="format 0"):
        read_capture(out / "capture")
    with pytest.raises(ValueError, match="holds no capture"):
        read_capture(out)
