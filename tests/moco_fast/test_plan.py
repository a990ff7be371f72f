"""Command `moco-fast plan`."""

import json
from pathlib import Path

import pytest

from moco_fast.cli import main

WORDS = ["plan", "--images", "1e9", "--image-kb", "110", "--nodes", "8", "--gpu", "h100", "--recipe", "moco-v2"]


def rows(printed: str) -> dict[str, list[str]]:
    """Cells of the printed table by the first one."""
    cells = [[cell for cell in line.split("  ") if cell] for line in printed.splitlines()]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in cells if line}


def bench(path: Path, **changes: object) -> Path:
    rate = {"median": 24_000.0, "lowest": 1.0, "highest": 3e4}
    figures = {
        "environment": {"world_size": 8, "encoder": "resnet50"},
        "step": rate,
        "loader": rate | {"median": 40_000.0},
    }
    path.write_text(json.dumps(figures | changes))
    return path


def test_the_table_names_the_bottleneck_and_what_smaller_images_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--network-gbit", "10", "--gpu-hour-price", "2", "--tb-month-price", "20"]) == 0
    printed = capsys.readouterr().out
    assert "estimated at 11% of the peak, not measured" in printed
    found = rows(printed)
    assert found["limited by"] == ["network", "GPUs"]
    assert found["shards"][0] == "214,844"
    assert found["read by all nodes"][0] == "10 GB/s"
    assert found["storage, price per month"][0] == "2,216"
    hours, price = (float(found[name][0].replace(",", "")) for name in ("GPU hours", "GPU hours, price"))
    assert price == pytest.approx(2 * hours, abs=1)
    assert "Stored at 256 pixels (make-shards pack --resize 256) it would run 2.4 times as fast." in printed
    assert "A batch of 256 is 4 samples per GPU" in printed
    assert "--batch-size 8,192" in printed


def test_measured_rates_come_from_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench(tmp_path / "bench.json")
    assert main([*WORDS, "--bench", str(file), "--batch-size", "8192", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step_per_s"], found["step_per_s_source"]) == (3000.0, f"measured, {file}")
    assert found["as stored"]["spare"]["loader"] == pytest.approx(5 / 3)
    assert found["as stored"]["samples_per_s"] == 64 * 3000


def test_a_run_by_steps_does_not_depend_on_the_number_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--images", "3e9", "--recipe", "moco-v1-1b", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["as stored"]["num_steps"] == 1_250_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--images", "0"], "--images is 0"),
        (
            ["--images", "255"],
            "--images 255 is less than one batch of 256: an epoch would have no steps; give a --batch-size of 192",
        ),
        (["--images", "63"], "give fewer ranks than 64"),
        (["--images", "inf"], "--images is inf"),
        (
            ["--nodes", "3"],
            "moco-v2's batch of 256 does not fit 3 nodes of 8 GPUs, a rank each: a batch of 256 cannot be",
        ),
        (["--nodes", "3", "--batch-size", "100"], "over 24 ranks: choose a batch size of 96 or 120, or one of 1, 2,"),
        (
            ["--batch-size", "32"],
            "--batch-size 32 does not fit 8 nodes of 8 GPUs, a rank each: a batch of 32 cannot be",
        ),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "-64"], "--batch-size is -64"),
        (["--passes", "nan"], "--passes is nan"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--images", "nan"], "--images is nan"),
        (["--image-kb", "-1"], "--image-kb is -1"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--recipe", "moco-v9"], "--recipe moco-v9 is not a recipe: choose one of moco-v1"),
        (["--gpu", "h9000"], "--gpu h9000 is not known: choose one of"),
        (["--encoder", "resnet5"], "resnet5"),
        (["--utilization", "0"], "--utilization is 0"),
        (["--utilization", "40"], "40% of the peak is 0.4"),
        (["--cache-tb", "-1"], "--cache-tb is -1"),
        (["--cache-tb", "nan"], "--cache-tb is nan"),
        (["--image-kb", "inf"], "--image-kb is inf"),
        (["--gpu-hour-price", "-1"], "--gpu-hour-price is -1"),
        (["--bench", "{there}/none.json"], "none.json is not what `moco-fast bench --json` writes"),
        (["--bench", "{there}/text.json"], "text.json is not what `moco-fast bench --json` writes"),
        (["--bench", "{there}/bare.json"], "bare.json is not what `moco-fast bench --json` writes"),
        (["--bench", "{there}/nothing.json"], "nothing.json is not what `moco-fast bench --json` writes"),
        (["--bench", "{there}/empty.json"], "empty.json is not what `moco-fast bench --json` writes"),
        (["--bench", "{there}/other.json"], "measured the encoder resnet18, and this plan is for resnet50"),
        (["--bench", "{there}/part.json"], "has no figure for the step"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    bench(tmp_path / "other.json", environment={"world_size": 1, "encoder": "resnet18"})
    bench(tmp_path / "part.json", step=None)
    bench(tmp_path / "none.json", environment={"world_size": 0, "encoder": "resnet50"})
    bench(tmp_path / "text.json", step={"median": "fast"})
    bench(tmp_path / "bare.json", loader={"lowest": 3})
    given = [word.format(there=tmp_path) for word in words]
    assert main([*WORDS, *given]) == 2
    assert says in capsys.readouterr().err
