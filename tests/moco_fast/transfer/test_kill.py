"""A transfer by `accelerate launch` on two ranks that is killed: the same command goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.moco_fast.test_rendezvous import below
from tests.moco_fast.transfer.pixel_shapes import write_voc_pixels

CONFIG = Path(__file__).parents[3] / "deploy" / "accelerate" / "cpu-2.yaml"


def start(data: Path, out: Path) -> subprocess.Popen[str]:
    words = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "-m", "moco_fast.cli"]
    words += ["transfer", "segment", "--data", str(data), "--init", "random", "--network", "resnet18_quarter"]
    words += ["--out", str(out), "--batch-size", "4", "--steps", "40", "--crop", "33", "--threads", "1"]
    words += ["--device", "cpu", "--save-every-steps", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *words],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher: subprocess.Popen[str]) -> None:
    said = launcher.communicate(timeout=240)[1]
    assert launcher.returncode == 0, said


def states(out: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in (out / "trainings").glob("*/step-*") if path.suffix == ""]


@pytest.mark.long
@pytest.mark.faults
def test_a_killed_transfer_of_two_ranks_goes_on_to_the_same_bits(tmp_path) -> None:
    data = write_voc_pixels(tmp_path / "VOC2012", {"train_aug": 6, "val": 3}).parent
    killed = start(data, tmp_path / "killed")
    while not states(tmp_path / "killed"):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    # Ranks have sessions of their own. The launcher comes last: it would tell the others of the first that is gone.
    processes = [*below(killed.pid), killed.pid]
    assert len(processes) >= 3
    for process in processes:
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    assert 0 < max(states(tmp_path / "killed")) < 40
    finish(start(data, tmp_path / "killed"))
    finish(start(data, tmp_path / "whole"))
    files = [next((tmp_path / name / "trained").iterdir()) for name in ("killed", "whole")]
    assert files[0].name == files[1].name
    assert files[0].read_bytes() == files[1].read_bytes()
    per_class = [(tmp_path / name / "per-class.csv").read_text() for name in ("killed", "whole")]
    assert per_class[0] == per_class[1]
