"""The demo, from photographs to a report, on the device under test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    for split in ("train", "val"):
        command("shards.cli", "pack", f"images/{split}", "--out", f"shards/{split}")
    on_gpu = device.type == "cuda"
    config = ROOT / "deploy" / "accelerate" / f"{'gpu' if on_gpu else 'cpu'}-1.yaml"
    # A GPU takes a minute for the whole demo; a CPU shows in a few steps that the commands fit together.
    shorter = () if on_gpu else ("--run.steps", 3, "--data.batch-size", 32, "--model.encoder", "resnet18_quarter")
    data = ("--data.shards", "shards/train", "--eval.shards", "shards/val", "--run.out", "run")
    launch = ("accelerate.commands.launch", "--config_file", config, "-m", "moco_fast.train", "demo")
    command(*launch, *data, *shorter)
    command("moco_fast.cli", "report", "run")

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    top1 = [line["knn/top1"] for line in metrics if "knn/top1" in line]
    assert len(top1) >= 2
    if on_gpu:
        assert top1[-1] > top1[0] + 0.1, top1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["cuda"] is not None) == on_gpu
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
