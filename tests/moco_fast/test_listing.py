import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moco_fast.cli import main
from moco_fast.report.listing import ListedRun, list_runs


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> Path:
    """Runs in every state, and what is broken or no run, at several depths."""
    folder = tmp_path / "runs"
    states = {
        "finished": "finished",
        "deep/er/stopped": "stopped",
        "failed": "failed",
        "killed": "running",
        "alive": "running",
    }
    for name, outcome in states.items():
        run = Path(shutil.copytree(finished_run, folder / name))
        (run / "outcome.json").write_text(json.dumps({"outcome": outcome}))
        (run / "lock").touch()
    lines = (folder / "alive" / "metrics.jsonl").read_text().splitlines(keepends=True)
    # Three quarters of the steps, and a line that is being written.
    (folder / "alive" / "metrics.jsonl").write_text("".join(lines[:5]) + '{"step": 40, "knn/to')
    for name, file, text in (
        ("broken/config", "config.json", "{"),
        ("broken/other-version", "config.json", '{"moco": {}}'),
        ("broken/outcome", "outcome.json", '{"outcome'),
        ("broken/metrics", "metrics.jsonl", "\0\0\0\n[1]\n"),
    ):
        run = Path(shutil.copytree(finished_run, folder / name))
        (run / file).write_text(text)
    line = json.dumps({"step": 0, "about": "queue", "warning": "old and new keys are hardly comparable"})
    (folder / "failed" / "warnings.jsonl").write_text(f"{line}\n{line[:9]}\n{line}\n")
    (folder / "begun" / "checkpoints").mkdir(parents=True)
    (folder / "begun" / "lock").touch()
    # Neither is a run's: an encoder of another library, and a folder with a link back up.
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text("{}")
    (folder / "links").mkdir()
    (folder / "links" / "up").symlink_to(folder)
    return folder


def listed(folder: Path) -> dict[str, ListedRun]:
    return {str(run.path.relative_to(folder)): run for run in list_runs(folder)}


def test_states_follow_from_outcome_and_lock(runs: Path) -> None:
    descriptor = os.open(runs / "alive" / "lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        found = listed(runs)
    finally:
        os.close(descriptor)
    states = {name: found[name].state for name in ("finished", "deep/er/stopped", "failed", "killed", "alive", "begun")}
    assert states == {
        "finished": "finished",
        "deep/er/stopped": "stopped",
        "failed": "failed",
        "killed": "killed",
        "alive": "running",
        "begun": "killed",
    }
    assert found["alive"].left_s == pytest.approx(2.5 * 10)
    assert found["killed"].left_s is None


def test_progress_figures_age_and_size(runs: Path) -> None:
    found = listed(runs)
    run = found["finished"]
    assert (run.step, run.num_steps) == (40, 40)
    assert (run.figure, run.title, run.is_percent) == ("knn/top1", "kNN top-1", True)
    assert (run.last, run.best, run.best_at) == (0.65, 0.65, 40)
    assert run.seen == (runs / "finished" / "outcome.json").stat().st_mtime
    files = [path for path in (runs / "finished").rglob("*") if path.is_file() and not path.is_symlink()]
    assert {name: run.num_warnings for name, run in found.items() if run.num_warnings} == {"failed": 2}
    assert run.size_bytes == sum(512 * path.stat().st_blocks for path in files)
    assert (found["alive"].step, found["alive"].last, found["alive"].best_at) == (30, 0.45, 20)


def test_what_is_broken_is_a_row_with_its_problem(runs: Path) -> None:
    found = listed(runs)
    assert set(found) == {
        *("finished", "deep/er/stopped", "failed", "killed", "alive", "begun"),
        *("broken/config", "broken/other-version", "broken/outcome", "broken/metrics"),
    }
    problems = {name: "; ".join(run.problems) for name, run in found.items()}
    assert "config.json is damaged" in problems["broken/config"]
    assert "has no field moco" in problems["broken/other-version"]
    assert "outcome.json is damaged" in problems["broken/outcome"]
    assert "config.json is missing" in problems["begun"]
    assert [name for name, problem in problems.items() if problem] == [
        *("begun", "broken/config", "broken/other-version", "broken/outcome")
    ]
    # What can be read is there all the same.
    assert (found["broken/config"].state, found["broken/config"].step) == ("finished", 40)
    assert found["broken/config"].figure == "loss"
    assert found["broken/metrics"].size_bytes > 0


def test_a_folder_that_cannot_be_read_does_not_end_the_list(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "broken":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = listed(runs)
    assert found["broken"].problems == ["cannot be read: Permission denied"]
    assert "finished" in found


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "there is no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("by", "first"),
    [("path", "alive"), ("state", "killed"), ("progress", "broken"), ("best", "finished"), ("size", "")],
)
def test_the_table_and_json_say_the_same(by: str, first: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "finished" / "metrics.jsonl").write_text(
        (runs / "finished" / "metrics.jsonl").read_text().replace("0.65", "0.95")
    )
    for name in ("alive", "begun"):
        (runs / name / "outcome.json").write_text(json.dumps({"outcome": "stopped"}))
    assert main(["runs", str(runs), "--sort", by, "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)
    assert main(["runs", str(runs), "--sort", by]) == 0
    lines, _, problems = capsys.readouterr().out.partition("\n\n")
    heading, *rows = lines.splitlines()
    assert heading.split() == ["run", "state", "warnings", "step", "figure", "best", "last", "left", "seen", "size"]
    assert [row.split()[0] for row in rows] == [str(Path(each["path"]).relative_to(runs)) for each in objects]
    assert first in rows[0]
    assert "broken/config: config.json is damaged" in problems
    sizes = [each["size_bytes"] for each in objects]
    assert by != "size" or sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_list_that_is_no_longer_read_ends_quietly(words: list[str], runs: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moco_fast.cli", "runs", str(runs), *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
