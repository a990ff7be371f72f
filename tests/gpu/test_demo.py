"""The demo, from photographs to a report, on the device under test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moco_fast.report.record import read_run

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path):
    def run(*arguments):
        result = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    return run


def test_demo_learns(command, device, tmp_path):
    command("moco_fast.demo", "images")
    command("shards.cli", "pack", "images/train", "--labels", "none", "--out", "shards")
    on_gpu = device.type == "cuda"
    config = ROOT / "deploy" / "accelerate" / f"{'gpu' if on_gpu else 'cpu'}-1.yaml"
    # A GPU takes a minute for the whole demo; a CPU shows in a few steps that the commands fit together.
    shorter = () if on_gpu else ("--run.steps", 3, "--data.batch-size", 32, "--model.encoder", "resnet18_quarter")
    data = ("--data.shards", "shards", "--eval.tasks", "health", "--run.out", "run")
    launch = ("accelerate.commands.launch", "--config_file", config, "-m", "moco_fast.train", "demo")
    command(*launch, *data, *shorter)
    command("moco_fast.cli", "report", "run")
    labeled = ("--train", "images/train", "--test", "images/val", "--beside", "untrained")
    on_device = ("--device", device.type, "--cache", "cache")
    command("moco_fast.cli", "eval", "knn", "--encoder", "run", *labeled, *on_device)
    command("moco_fast.cli", "report", "run")

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in metrics if "health/rankme" in line]) >= 2
    top1 = {result.encoder["name"]: result.headline.value for result in read_run(tmp_path / "run").results}
    untrained = top1.pop("untrained")
    [trained] = top1.values()
    if on_gpu:
        assert trained > untrained + 0.1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["cuda"] is not None) == on_gpu
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Training samples, evenly spread over the set" in page  # neighbors without labels
    assert "kNN top-1" in page
