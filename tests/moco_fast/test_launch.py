import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast.report.launch import hours_tile, launch_table, starts_table
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.training import launch
from moco_fast.training.launch import launch_facts

OURS = ["-m", "moco_fast.train", "moco-v2", "--data.shards", "my shards"]


def facts(monkeypatch: pytest.MonkeyPatch, parent: list[str], **env: str) -> dict[str, Any]:
    monkeypatch.setattr(launch, "command_of", lambda pid: parent)
    return launch_facts(env)


@pytest.mark.parametrize("joined", [False, True])
def test_the_launcher_and_its_configuration_are_kept(
    joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gpu-8.yaml"
    config.write_text("num_processes: 8\n")
    option = [f"--config_file={config}"] if joined else ["--config_file", str(config)]
    parent = ["/v/bin/python", "/v/bin/accelerate", "launch", *option, *OURS]
    known = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "HOME": "/root",
        "AWS_SECRET_ACCESS_KEY": "x",
        "OMP_NUM_THREADS": "4",
    }
    found = facts(monkeypatch, parent, **known)
    assert found["command"] == parent
    assert (found["config_file"], found["config"]) == (str(config), "num_processes: 8\n")
    assert found["variables"] == {"ACCELERATE_MIXED_PRECISION": "bf16", "OMP_NUM_THREADS": "4"}
    assert found["folder"] == str(Path.cwd())


def test_accelerates_own_file_is_found_and_the_programs_options_are_not_the_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = ["/v/bin/python", "/v/bin/accelerate", "launch", *OURS, "--config_file", "ours.yaml"]
    assert facts(monkeypatch, parent, HF_HOME=str(tmp_path))["config_file"] is None
    (tmp_path / "accelerate").mkdir()
    for suffix in ("json", "yaml"):
        file = tmp_path / "accelerate" / f"default_config.{suffix}"
        file.write_text("{}")
        assert facts(monkeypatch, parent, HF_HOME=str(tmp_path))["config_file"] == str(file)


def test_a_run_that_was_started_by_hand_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts(monkeypatch, ["bash"], HF_HOME="/nowhere")
    assert (found["command"], found["config_file"], found["config"], found["variables"]) == (None, None, None, {})


def test_a_missing_configuration_file_is_named_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = ["/v/bin/python", "/v/bin/accelerate", "launch", "--config_file", "/nowhere.yaml", *OURS]
    found = facts(monkeypatch, parent)
    assert (found["config_file"], found["config"]) == ("/nowhere.yaml", None)


@pytest.fixture
def run(own_run: Path) -> Path:
    """A run on two machines that was continued twice, once with changes."""
    run = own_run
    environment = json.loads((run / "environment.json").read_text())
    variables = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    command = ["/v/bin/python", "/v/bin/accelerate", "launch", "--num_processes", "3", *OURS]
    environment |= {
        "hosts": ["node-1", "node-1", "node-2"],
        "launch": {
            "command": command,
            "folder": "/data",
            "config_file": "a.yaml",
            "config": "<num>: 3",
            "variables": variables,
        },
    }
    (run / "environment.json").write_text(json.dumps(environment))
    starts = [
        {"step": step, "time_s": 2.5 * step, "at": 1000.0 * number, "before_seen": 1000.0 * number - 500}
        | {"world_size": 1 + number, "device": "H100"}
        for number, step in enumerate((0, 20, 20))
    ]
    (run / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    changes = {"step": 20, "allowed": ["--run.steps: 20 -> 40"], "noted": ["--eval.k: 5 -> 7"]}
    (run / "changes.jsonl").write_text(json.dumps(changes) + "\n")
    (run / "outcome.json").write_text(json.dumps({"outcome": "finished", "at": 3000.0}))
    return run


def test_the_report_shows_launch_starts_changes_and_hours(run: Path) -> None:
    page = write_report(run, device=torch.device("cpu"), num_samples=1, price_per_hour=36.0).read_text()
    for words in (
        "<pre>accelerate launch --num_processes 3 -m moco_fast.train moco-v2 --data.shards &#39;my shards&#39;</pre>",
        "node-1 (2 ranks), node-2 (1 rank)",
        "&lt;num&gt;: 3",
        "ACCELERATE_MIXED_PRECISION",
        "--run.steps: 20 -&gt; 40 (as --run.allow-changes said); --eval.k: 5 -&gt; 7",
        "1970-01-01 00:16 UTC",
        "Rank hours",
        # 1 rank for 500 s, 2 for 500 s, 3 for 1,000 s.
        "cost 45.00; ",
        "3 starts",
    ):
        assert words in page


def test_a_run_that_was_not_continued_has_no_table_of_starts(run: Path, finished_run: Path) -> None:
    assert [row[0] for row in starts_table(read_run(run))] == ["0", "20", "20"]
    assert starts_table(read_run(finished_run)) == []
    assert launch_table(read_run(finished_run)) == []
    assert [tile.name for tile in hours_tile(read_run(finished_run), None)] == ["Rank hours"]


def test_changes_of_a_version_that_did_not_note_starts_are_shown(run: Path) -> None:
    (run / "starts.jsonl").unlink()
    assert [row[0] for row in starts_table(read_run(run))] == ["20"]


@pytest.mark.parametrize(
    ("words", "command", "recipe"),
    [
        (["/v/python", "/v/bin/moco-fast", "train", "byol", "--x", "1"], "moco-fast train byol --x 1", "byol"),
        (["/v/python", "-u", "-m", "moco_fast.train", "byol"], "python -m moco_fast.train byol", "byol"),
        (["/v/python", "mine.py", "--recipe", "byol"], "", "moco-v2"),
    ],
)
def test_commands_of_every_kind_are_written_as_they_are_typed(
    words: list[str], command: str, recipe: str, run: Path
) -> None:
    (run / "environment.json").write_text(json.dumps({"command": words}))
    record = read_run(run)
    assert (record.command, record.recipe) == (command, recipe)
