"""`make gpu-check DEVICE=cpu` runs everywhere, so that the script is in order when there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_measures_loader_and_step_on_the_cpu(tmp_path):
    result = check("--device", "cpu", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["environment"]["versions"]["torch"]
    (setting,) = report["results"]
    rates = setting["samples_per_s"]
    assert all(0 < rates[what]["min"] <= rates[what]["median"] <= rates[what]["max"] for what in rates)
    assert rates.keys() == {"loader", "step", "both"}
    table = (tmp_path / "results.md").read_text()
    assert f"{rates['both']['median']:,.0f}" in table
    assert table in result.stdout


def test_says_that_there_is_no_gpu(tmp_path):
    result = check("--device", "cuda", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stderr.strip() == "error: torch finds no GPU here: add DEVICE=cpu for the small version"
    assert not list(tmp_path.iterdir())
