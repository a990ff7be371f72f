"""A run as its user starts it: real processes, real files, real kills."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moco_fast import checkpoint
from tests.warm import WarmPython

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "deploy" / "accelerate"
PYTHON = (sys.executable, "-m", "moco_fast.train")
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
ONE_RANK = (*LAUNCH, str(CONFIGS / "cpu-1.yaml"), "-m", "moco_fast.train")
TWO_RANKS = (*LAUNCH, str(CONFIGS / "cpu-2.yaml"), "-m", "moco_fast.train")

EXACT = ("loss", "accuracy", "similarity_positive", "similarity_negative", "feature_std", "grad_norm", "lr", "epoch")


class Training:
    """One start of a run, small enough for a test; without a launcher, in a process that has torch already."""

    python: WarmPython

    def __init__(
        self, demo, out: Path, *options: str, launcher: tuple[str, ...] = (), world: dict[str, str] | None = None
    ):
        self.out = out
        command = [*launcher, "demo", "--data.shards", str(demo.train), "--run.out", str(out)]
        command += ["--model.encoder", "resnet18_quarter", "--data.batch-size", "32", "--data.lanes", "8"]
        command += ["--bn.num-groups", "4", "--method.queue-size", "128", "--run.steps", "20", "--log.every-steps", "1"]
        command += ["--checkpoint.every-steps", "5", "--run.device", "cpu", "--data.backend", "dali", *options]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | (world or {})
        if launcher:
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stderr=pipe, stdout=null, text=True, env=env)
        else:
            self.process = self.python.start("-m", "moco_fast.train", *command, env=env)

    def finish(self, expected_code: int = 0) -> str:
        """Wait for the end; return what it said."""
        _, said = self.process.communicate(timeout=240)
        assert self.process.returncode == expected_code, said
        return said

    def wait_for_step(self, step: int) -> None:
        """Return as soon as a line of metrics of this step or a later one is there."""
        while self.process.poll() is None:
            if any(line["step"] >= step for line in read_metrics(self.out)):
                return
            time.sleep(0.01)
        raise AssertionError(self.process.communicate()[1])


def train_on_two_ranks(demo, out: Path, *options: str) -> None:
    """Train to the end as a launcher's ranks do, without the launcher."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [Training(demo, out, *options, world=world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        rank.finish()


def read_metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def exact_numbers(out: Path) -> list[tuple]:
    return [tuple(line[name] for name in ("step", *EXACT)) for line in read_metrics(out) if "loss" in line]


def last_tensors(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.find_newest(out / "checkpoints")
    assert newest is not None
    saved = checkpoint.load(newest)
    return {**saved.model, **saved.optimizer}


def assert_same_end(one: Path, other: Path, *, world_size: int = 1) -> None:
    assert exact_numbers(one) == exact_numbers(other)
    before, after = last_tensors(one), last_tensors(other)
    assert before.keys() == after.keys()
    if world_size > 1:
        # Running statistics are averaged over ranks at every saving; when that happens changes their last bits.
        averaged = [name for name in before if name.startswith("query.") and "running_" in name]
        for name in averaged:
            torch.testing.assert_close(before.pop(name), after[name], rtol=1e-5, atol=1e-6)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module", autouse=True)
def python(warm_python):
    Training.python = warm_python


@pytest.fixture(scope="module")
def uninterrupted(packed_demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "uninterrupted"
    Training(packed_demo, out, launcher=PYTHON).finish()
    return out


def test_a_finished_run_leaves_everything(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.json", "environment.json", "outcome.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    outcome = json.loads((uninterrupted / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["num_steps"]) == ("finished", 20, 20)
    assert [path.name for path in sorted((uninterrupted / "checkpoints").iterdir())] == [
        "step-00000015",
        "step-00000020",
    ]
    lines = read_metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["samples"] == 640
    assert all(0 < line["loss"] < 20 and line["samples_per_s"] > 0 for line in lines)
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)


def test_both_encoders_move_and_stay_apart(uninterrupted):
    saved = checkpoint.load(uninterrupted / "checkpoints" / "step-00000015").model
    later = last_tensors(uninterrupted)
    name = "backbone.layer4.0.conv1.weight"
    assert not torch.equal(later[f"query.{name}"], saved[f"query.{name}"])
    assert not torch.equal(later[f"key.{name}"], saved[f"key.{name}"])
    assert not torch.equal(later[f"key.{name}"], later[f"query.{name}"])


def test_a_finished_run_is_not_run_again_even_if_watched_otherwise(packed_demo, uninterrupted):
    before, file = exact_numbers(uninterrupted), uninterrupted / "config.json"
    config = json.loads(file.read_text())
    config["optim"]["published"] = [[32, 0.06]]  # What is known of the recipe may grow with a release.
    file.write_text(json.dumps(config))
    watched_otherwise = ("--log.every-steps", "7", "--checkpoint.every-steps", "4")
    assert "finished 20 steps" in Training(packed_demo, uninterrupted, *watched_otherwise).finish()
    assert exact_numbers(uninterrupted) == before


def test_other_settings_are_refused_and_lose_nothing(packed_demo, uninterrupted):
    said = Training(packed_demo, uninterrupted, "--optim.lr", "0.5").finish(expected_code=2)
    assert "--optim.lr: 0.06 -> 0.5" in said
    assert "Traceback" not in said
    assert len(exact_numbers(uninterrupted)) == 20


@pytest.mark.faults
def test_killed_in_mid_epoch_the_same_command_continues_bit_for_bit(packed_demo, uninterrupted, tmp_path):
    first = Training(packed_demo, tmp_path / "run")
    first.wait_for_step(12)
    first.process.send_signal(signal.SIGKILL)
    first.process.communicate()
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "running"
    assert "continuing" in Training(packed_demo, tmp_path / "run").finish()
    assert_same_end(uninterrupted, tmp_path / "run")


@pytest.mark.faults
def test_told_to_stop_it_saves_and_continues_bit_for_bit(packed_demo, uninterrupted, tmp_path):
    out = tmp_path / "run"
    for number, step in ((signal.SIGUSR1, 2), (signal.SIGINT, 7), (signal.SIGTERM, 12)):
        started = Training(packed_demo, out)
        started.wait_for_step(step)
        started.process.send_signal(number)
        assert "stopped and saved at step" in started.finish(expected_code=128 + number)
        outcome = json.loads((out / "outcome.json").read_text())
        assert outcome["outcome"] == "stopped"
        assert step <= outcome["step"] < 20
    Training(packed_demo, out).finish()
    assert_same_end(uninterrupted, out)


def test_a_start_that_was_refused_leaves_the_folder_to_another(packed_demo, tmp_path):
    said = Training(packed_demo, tmp_path / "run", "--data.batch-size", "289").finish(expected_code=2)
    assert "less than one batch" in said or "multiple of" in said
    Training(packed_demo, tmp_path / "run", "--run.steps", "1").finish()


def test_a_second_run_in_the_same_folder_is_refused(packed_demo, tmp_path):
    first = Training(packed_demo, tmp_path / "run", "--run.steps", "1000")
    first.wait_for_step(1)
    said = Training(packed_demo, tmp_path / "run", "--run.steps", "1000").finish(expected_code=2)
    assert "in use by another run" in said
    first.process.send_signal(signal.SIGTERM)
    first.finish(expected_code=128 + signal.SIGTERM)


def test_evaluation_while_the_run_goes_on_changes_nothing_else(packed_demo, uninterrupted, tmp_path):
    out = tmp_path / "run"
    options = ("--eval.shards", str(packed_demo.val), "--eval.every-steps", "7", "--eval.k", "5")
    Training(packed_demo, out, *options).finish()
    found = {line["step"]: line["knn/top1"] for line in read_metrics(out) if "knn/top1" in line}
    assert list(found) == [0, 7, 14, 20]
    assert all(0 < top1 <= 1 for top1 in found.values())
    assert_same_end(uninterrupted, out)


def test_accumulation_takes_that_many_batches_a_step(packed_demo, tmp_path):
    out = tmp_path / "run"
    Training(packed_demo, out, "--optim.accumulate", "2", "--run.steps", "4").finish()
    assert [line["samples"] for line in read_metrics(out)] == [64, 128, 192, 256]


def test_a_loss_that_is_no_number_stops_the_run(packed_demo, tmp_path):
    said = Training(packed_demo, tmp_path / "run", "--optim.lr", "1e30").finish(expected_code=1)
    assert "the loss is no longer a number" in said
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "failed"
    newest = checkpoint.find_newest(tmp_path / "run" / "checkpoints")
    assert newest is None or all(tensor.isfinite().all() for tensor in checkpoint.load(newest).model.values())


@pytest.mark.faults
def test_two_ranks_train_and_continue_after_a_stop(packed_demo, tmp_path):
    options = ("--run.steps", "40", "--eval.shards", str(packed_demo.val), "--eval.every-steps", "1000")
    train_on_two_ranks(packed_demo, tmp_path / "whole", *options)
    environment = json.loads((tmp_path / "whole" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["steps_per_epoch"] == packed_demo.num_train // 32
    assert [line["samples"] for line in read_metrics(tmp_path / "whole") if "loss" in line][-1] == 40 * 32
    cut = Training(packed_demo, tmp_path / "cut", *options, launcher=TWO_RANKS)
    cut.wait_for_step(2)
    cut.process.send_signal(signal.SIGTERM)  # the launcher passes it on to its ranks
    assert "stopped and saved at step" in cut.finish(expected_code=1)  # the launcher's code, whatever the ranks return
    assert json.loads((tmp_path / "cut" / "outcome.json").read_text())["step"] < 40
    train_on_two_ranks(packed_demo, tmp_path / "cut", *options)
    assert_same_end(tmp_path / "whole", tmp_path / "cut", world_size=2)


@pytest.mark.faults
def test_when_its_launcher_is_told_to_stop_a_single_process_saves(packed_demo, tmp_path):
    # For one process accelerate forwards no signal: it dies, and nobody would end the training.
    run = Training(packed_demo, tmp_path / "run", "--run.steps", "1000", launcher=ONE_RANK)
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)
    assert "stopped and saved at step" in run.finish(expected_code=-signal.SIGTERM)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "stopped"


def test_a_process_that_would_train_alone_refuses_to_start(packed_demo, tmp_path):
    # On CPUs without MPI, accelerate starts a single process when it is asked for two.
    alone = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "moco_fast.train",
    )
    said = Training(packed_demo, tmp_path / "run", launcher=alone).finish(expected_code=1)
    assert "would train alone" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_names_one_that_can(packed_demo, tmp_path):
    said = Training(packed_demo, tmp_path / "run", "--data.batch-size", "36", "--bn.num-groups", "8").finish(2)
    assert "multiple of" in said
    assert "Traceback" not in said
