import json
import os
import re
import subprocess
import sys

import pytest

from moco_fast.bench import BenchResult, Rate, main, verdict


def result(*, loader: float, step: float, end_to_end: float, on_gpu: bool = True) -> BenchResult:
    rates = [Rate(median=rate, lowest=rate, highest=rate) for rate in (loader, step, end_to_end)]
    memory = 1 << 30 if on_gpu else None
    return BenchResult(
        loader=rates[0],
        step=rates[1],
        end_to_end=rates[2],
        data_wait_share=0.0,
        torch_peak_bytes=memory,
        device_used_bytes=memory,
        environment={},
    )


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"loader": 2000, "step": 1000, "end_to_end": 990}, "2.0x what the step consumes.*99%.*as it should be"),
        ({"loader": 1100, "step": 1000, "end_to_end": 990}, "little to spare"),
        ({"loader": 500, "step": 1000, "end_to_end": 495}, "0.5x.*99%.*bound by the loader"),
        ({"loader": 2000, "step": 1000, "end_to_end": 700}, "70%.*each other's way"),
        ({"loader": 2000, "step": 100, "end_to_end": 80, "on_gpu": False}, "80%.*share the cores"),
    ],
)
def test_the_verdict_names_what_limits(rates, says):
    assert re.search(says, verdict(result(**rates)))


def test_a_missing_folder_is_told_in_one_line(tmp_path, capsys):
    assert main(["moco-v2", "--data.shards", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "has no manifest.json" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_it_measures_a_recipe_and_leaves_no_run_behind(packed_demo, tmp_path):
    command = [
        sys.executable,
        "-m",
        "moco_fast.bench",
        "--seconds",
        "0.2",
        "--json",
        str(tmp_path / "bench.json"),
        "demo",
    ]
    command += ["--data.shards", str(packed_demo.train), "--data.batch-size", "32", "--bn.num-groups", "4"]
    command += ["--model.encoder", "resnet18_quarter", "--moco.queue-size", "128", "--run.device", "cpu"]
    command += ["--run.out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=True)
    assert "loader alone" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    for name in ("loader", "step", "end_to_end"):
        assert 0 < found[name]["lowest"] <= found[name]["median"] <= found[name]["highest"]
    assert found["loader"]["median"] > found["end_to_end"]["lowest"]
    assert found["verdict"] in done.stdout
    assert not (tmp_path / "run").exists()
