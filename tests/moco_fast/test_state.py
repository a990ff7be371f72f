"""State of a run, as told by facts: late refusals, full disks, folders that vanish, kills."""

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.evaluation.live import RunEvaluation
from moco_fast.recovery import candidates
from moco_fast.training.folder import open_folder
from moco_fast.training.heartbeat import RunLostError
from moco_fast.training.loop import train
from moco_fast.training.metrics import MetricsFile
from moco_fast.training.state import Beat, last_seen, read_beat, read_lines, read_outcome, run_state, write_beat
from moco_fast.training.trackers import Trackers
from shards.ground.locks import is_locked, locked
from tests.moco_fast.small_runs import small_run


@pytest.mark.parametrize(
    ("outcome", "host", "age_s", "expected"),
    [
        ("finished", "elsewhere", 1, "finished"),
        ("failed", None, 0, "failed"),
        ("running", None, 0, "killed"),
        ("running", os.uname().nodename, 1, "killed"),
        ("running", "elsewhere", 30, "running"),
        ("running", "elsewhere", 600, "killed"),
        ("", None, 0, "killed"),
        ("\0\0\0", None, 0, "killed"),
    ],
)
def test_the_state_follows_from_lock_heartbeat_and_last_word(
    tmp_path: Path, outcome: str, host: str | None, age_s: float, expected: str
) -> None:
    text = outcome if outcome.strip("\0") == "" else json.dumps({"outcome": outcome})
    (tmp_path / "outcome.json").write_text(text)
    assert last_seen(tmp_path) is not None
    if host is not None:
        beat = Beat(time=time.time() - age_s, step=3, step_time=time.time() - age_s, host=host, pid=1)
        write_beat(tmp_path, beat)
        assert read_beat(tmp_path) == beat
        assert last_seen(tmp_path) == beat.time
    assert run_state(tmp_path) == expected
    with locked(tmp_path / "lock", holder="the run"):
        assert run_state(tmp_path) == "running"
        assert is_locked(tmp_path / "lock")
    assert run_state(tmp_path) == expected


def test_bad_lines_are_left_out(tmp_path: Path) -> None:
    good = {"step": 3, "loss": 1.5}
    bad = [b"", b"{", b"7", b"null", b"[3]", b'{"step": "3"}', b'{"loss": 2}', b"\0" * 40, b"\xff\xfe", b"[" * 9000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([json.dumps(good).encode(), *bad, json.dumps(good).encode()]))
    assert read_lines(tmp_path / "metrics.jsonl") == [good, good]
    MetricsFile(tmp_path, step=3, trackers=Trackers()).close()
    assert (tmp_path / "metrics.jsonl").read_text() == 2 * (json.dumps(good) + "\n")
    (tmp_path / "changes.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"changes\.jsonl cannot be read \(Is a directory\)"):
        read_lines(tmp_path / "changes.jsonl")
    assert read_lines(tmp_path / "nothing") == []


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(
    packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    config = small_run(packed_demo.train, out, steps=3)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=1))
    train(config)
    newest = out / "checkpoints/step-00000003"
    before = {name: each.clone() for name, each in checkpoint.load(newest).model.items()}  # not mapped from the file
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().err
    assert "warning: " in said
    assert (
        "model.safetensors is not what was written (its bytes and xxh3_128 differ); going on from step-00000002" in said
    )
    after = checkpoint.load(newest).model
    assert [name for name, each in before.items() if not torch.equal(after[name], each)] == []
    assert (newest.with_name("damaged-step-00000003") / "state.json").is_file()
    for path in candidates(out / "checkpoints"):
        (path / "rng.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*rng\.safetensors is missing"):
        train(config)
    assert run_state(out) == "finished"


def start(demo: Any, out: Path, *, at_step_2: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, **run: Any) -> None:
    """Run 4 steps with a checkpoint after the third, and do something when the line of the second is written."""
    plain = MetricsFile.write

    def write(self: MetricsFile, line: dict[str, Any]) -> None:
        plain(self, line)
        if line["step"] == 2:
            at_step_2()

    monkeypatch.setattr(MetricsFile, "write", write)
    config = small_run(demo.train, out, steps=4, **run)
    train(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=3)))


@pytest.mark.faults
def test_a_folder_that_vanishes_ends_the_run_and_does_not_come_back(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(RunLostError, match=rf"--run\.out {out} was deleted, moved or replaced"):
        start(packed_demo, out, at_step_2=lambda: out.rename(moved), monkeypatch=monkeypatch)
    assert not out.exists()
    assert run_state(moved) == "killed"


def test_a_folder_that_another_run_has_now_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = open_folder(small_run(tmp_path, out, steps=1), {})
    folder.begin(0)
    assert not folder.heartbeat.look()
    out.rename(tmp_path / "moved")
    out.mkdir()
    (out / "lock").touch()
    assert folder.heartbeat.look()
    folder.note_failure(RunLostError(str(out)))
    folder.close()
    assert [path.name for path in out.iterdir()] == ["lock"]
    assert (tmp_path / "moved/heartbeat.json").is_file()


@pytest.mark.faults
def test_a_full_disk_is_a_failure(packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match="File too large"):
            start(
                packed_demo,
                tmp_path / "run",
                at_step_2=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1])),
                monkeypatch=monkeypatch,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run_state(tmp_path / "run") == "failed"
    assert "File too large" in read_outcome(tmp_path / "run")["error"]


def test_what_is_refused_after_the_start_has_failed(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("refused late")

    monkeypatch.setattr(RunEvaluation, "figures", refuse)
    config = small_run(packed_demo.train, tmp_path / "run", steps=2)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, shards=str(packed_demo.val)))
    with pytest.raises(ValueError, match="refused late"):
        train(config)
    assert run_state(tmp_path / "run") == "failed"
    assert read_outcome(tmp_path / "run")["error"] == "ValueError: refused late"
