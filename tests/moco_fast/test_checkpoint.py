import dataclasses
import json
import os
import signal
import time

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import Config, ModelConfig, to_dict
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.momentum import copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrastV3
from pipelines.config import VIEWS, DataConfig


def make(step: int, value: float = 0.0) -> Checkpoint:
    return Checkpoint(
        step=step,
        config={"run": {"seed": 1}},
        model={"query.weight": torch.full((3, 2), value), "queue.keys": torch.arange(4.0)},
        optimizer={"momentum_buffer/weight": torch.ones(3, 2)},
        rng={"0.cpu": torch.get_rng_state()},
        numbers={"loader": {"epoch": 1, "step": 2}},
    )


def test_comes_back_as_it_went(tmp_path):
    written = make(7, 0.1)
    path = checkpoint.save(tmp_path, written, keep=2)
    read = checkpoint.load(path)
    assert path.name == "step-00000007"
    assert (read.step, read.config, read.numbers) == (written.step, written.config, written.numbers)
    for name in ("model", "optimizer", "rng"):
        before, after = getattr(written, name), getattr(read, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", checkpoint._DTYPES)
def test_every_dtype_shape_and_layout_comes_back(tmp_path, dtype):
    weights = torch.randint(0, 100, (5, 4, 3, 2)).to(dtype)
    model = {
        "channels_last": weights.to(memory_format=torch.channels_last),
        "transposed": weights[0, 0].T,
        "every_other": weights[::2],
        "number": weights[0, 0, 0, 0],
        "none": weights[:0],
        "wide": torch.rand(3, dtype=torch.float64),
        "odd": torch.ones(3, dtype=torch.bool),
    }
    path = checkpoint.save(tmp_path, dataclasses.replace(make(1), model=model), keep=1)
    read = checkpoint.load(path).model
    assert read.keys() == model.keys()
    assert all(torch.equal(read[name], each) and read[name].dtype == each.dtype for name, each in model.items())


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 1000):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00001000"]
    assert checkpoint.find_newest(tmp_path) == tmp_path / "step-00001000"


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    checkpoint.save(tmp_path, make(1), keep=1, best=1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial" / "model.safetensors").touch()
    (tmp_path / ".best.partial").symlink_to("step-00000002")
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000001"]


def test_no_file_holds_a_pickle(tmp_path):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors", ".safetensors", ".safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_refuses_a_flipped_bit_anywhere(tmp_path, name):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    content = bytearray((path / name).read_bytes())
    for position in range(0, len(content), max(1, len(content) // 50)):
        content[position] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.split(".")[0]):
            checkpoint.load(path)
        content[position] ^= 1
    (path / name).write_bytes(content)
    checkpoint.load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_refuses_a_missing_file(tmp_path, name):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        checkpoint.load(path)


def test_refuses_a_pickle_in_place_of_tensors(tmp_path):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    torch.save({"weight": torch.ones(1)}, path / "model.safetensors")
    with pytest.raises(ValueError, match="not what was written"):
        checkpoint.load(path)


def test_refuses_another_format(tmp_path):
    path = checkpoint.save(tmp_path, make(1), keep=1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load(path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(1), keep=1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, make(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.load(tmp_path / "step-00000001")


def test_query_and_key_encoder_are_loaded_each_with_its_weights(tmp_path):
    method = MomentumContrastV3(dim=4, mlp_dim=8)
    config = Config(
        data=DataConfig(shards="shards"),
        views=VIEWS["cifar10"],
        model=ModelConfig(encoder="resnet18_quarter"),
        method=method,
    )
    query = build_encoder(config.model, method)
    key = copy_as_key_encoder(query)
    with torch.no_grad():
        for weight in key.parameters():
            weight.add_(1)
    model = {
        f"{of}.{name}": each for of, it in (("query", query), ("key", key)) for name, each in it.state_dict().items()
    }
    written = dataclasses.replace(make(3), config=to_dict(config), model=model)
    checkpoint.save(tmp_path / "checkpoints", written, keep=1)
    for which, expected in (("query", query), ("key", key)):
        read, encoder = checkpoint.load_encoder(tmp_path, which=which)
        assert read == config
        assert not encoder.training
        assert (encoder.predictor is None) == (which == "key")
        weights = encoder.state_dict()
        assert weights.keys() == expected.state_dict().keys()
        assert all(torch.equal(weights[name], each) for name, each in expected.state_dict().items())
    alone = {name: each for name, each in model.items() if name.startswith("query.")}
    checkpoint.save(tmp_path / "checkpoints", dataclasses.replace(written, step=4, model=alone), keep=1)
    with pytest.raises(ValueError, match="step-00000004 holds no key encoder"):
        checkpoint.load_encoder(tmp_path, which="key")


def test_load_encoder_says_when_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.load_encoder(tmp_path)


SAVES_FOR_EVER = """
import sys, torch
from pathlib import Path
from moco_fast.checkpoint import Checkpoint, save
for step in range(1, 1_000_000):
    save(Path(sys.argv[1]), Checkpoint(step=step, config={}, model={"w": torch.full((200_000,), float(step))},
                                       optimizer={}, rng={}), keep=1)
    with open(sys.argv[1] + ".saved", "a") as saved:
        saved.write(f"{step}\\n")
"""


def newest_said(folder):
    """The last step that the process said to have saved; 0: none yet."""
    said = folder.with_name(f"{folder.name}.saved")
    whole = said.read_text().rpartition("\n")[0] if said.exists() else ""
    return int(whole.rpartition("\n")[2] or 0)


@pytest.mark.faults
@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, warm_python):
    for round_ in range(6):
        folder = tmp_path / str(round_)
        process = warm_python.start("-c", SAVES_FOR_EVER, folder)
        while not newest_said(folder):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        # The moments differ from round to round, so that kills fall into writing, syncing, renaming and pruning.
        time.sleep(0.013 * round_)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        saved = newest_said(folder)
        newest = checkpoint.find_newest(folder)
        assert newest is not None
        read = checkpoint.load(newest)
        assert read.step >= saved
        assert torch.equal(read.model["w"], torch.full((200_000,), float(read.step)))
        checkpoint.sweep(folder)
        assert not list(folder.glob(".*"))
