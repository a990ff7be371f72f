"""Trackers, each the real library in its local mode: what a run sends there, before and after a resume."""

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_fast.training import trackers as module
from moco_fast.training.trackers import TRACKERS, About, TrackerKind, Trackers, add_rows, check_installed, open_trackers

pytestmark = pytest.mark.usefixtures("alone")

PICTURE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


@pytest.fixture
def alone(fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accelerate's trackers ask it which process this is; libraries find no server, and nothing of this user's."""
    from accelerate import Accelerator

    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    Accelerator(cpu=True)


def about(folder: Path, step: int = 0) -> About:
    options = {"optim.lr": 0.5, "run.out": "runs/first", "run.compile": False}
    return About(folder=folder, project="birds", name="first", tags=("small", "v2"), options=options, step=step)


def run_twice(name: str, folder: Path) -> dict[str, Any]:
    """A run that is stopped after step 8 and goes on from step 4; returns what is kept of the tracker."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    opened = open_trackers([name], about(folder), say=said.append)
    opened.show("views", PICTURE, step=0)
    for step in (4, 8):
        opened.log({"step": step, "loss": 1.0 + step, "knn/top1": 0.25})
    opened.close()
    known = json.loads((folder / "trackers.json").read_text())
    again = open_trackers([name], about(folder, step=4), say=said.append)
    again.log({"step": 8, "loss": 2.0})
    again.log({"step": 12, "loss": 3.0})
    again.close()
    assert json.loads((folder / "trackers.json").read_text()) == known
    add_rows(about(folder), [(12, {"linear-fast/top1": 0.5})], say=said.append)
    assert said == []
    return known[name]


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: after 7 bytes, LevelDB's log format (core/pkg/leveldb/record.go of wandb/wandb)."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or the last part of one
            yield parts
            parts = b""


def test_tensorboard(tmp_path: Path) -> None:
    assert run_twice("tensorboard", tmp_path / "run") == {}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(4, 5.0), (8, 2.0), (12, 3.0)]
    assert [event.step for event in board.Images("views")] == [0]
    [text, *_] = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("configuration/text_summary")]
    assert "| optim.lr | 0.5 |" in text
    assert "| tags | small, v2 |" in text
    rows = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "eval"))
    rows.Reload()
    assert [(event.step, event.value) for event in rows.Scalars("linear-fast/top1")] == [(12, 0.5)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    known = run_twice("wandb", tmp_path / "run")
    wandb.teardown()  # a process of its own writes the files
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{known['id']}.wandb"] * 3
    rows: list[dict[str, Any]] = []
    options: set[str] = set()
    for file in files:
        for data in wandb_records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.project, record.run.run_id) == ("birds", known["id"])
            if record.HasField("config"):
                options |= {item.key or item.nested_key[0] for item in record.config.update}
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(4, 5.0), (8, 9.0), (8, 2.0), (12, 3.0)]
    assert [row["step"] for row in rows if "linear-fast/top1" in row] == [12]
    assert len(list(files[0].parent.rglob("views*.png"))) == 1
    assert {"optim.lr", "run.out", "run.compile"} <= options


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    known = run_twice("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient()
    run = client.get_run(known["run_id"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "birds"
    assert run.data.params == {"optim.lr": "0.5", "run.out": "runs/first", "run.compile": "False"}
    assert {"small", "v2"} <= run.data.tags.keys()
    losses = [(each.step, each.value) for each in client.get_metric_history(known["run_id"], "train/loss")]
    assert losses == [(4, 5.0), (8, 9.0), (8, 2.0), (12, 3.0)]
    assert run.data.metrics["linear-fast/top1"] == 0.5
    assert [file.path for file in client.list_artifacts(known["run_id"])] == ["views.png"]


def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # trackio reads its folder when it is imported.
    import trackio.sqlite_storage
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    known = run_twice("trackio", tmp_path / "run")
    assert known["name"].startswith("first-")
    storage = trackio.sqlite_storage.SQLiteStorage
    rows = storage.get_logs("birds", known["name"])
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(4, 5.0), (8, 9.0), (8, 2.0), (12, 3.0)]
    assert [row["step"] for row in rows if "linear-fast/top1" in row] == [12]
    assert any("views" in row for row in rows)
    assert storage.get_run_config("birds", known["name"])["optim.lr"] == 0.5


# When they fail --------------------------------------------------------------------------------------------------


class Failing:
    """accelerate's side of a tracker whose network goes."""

    def __init__(self, *, opens: bool = True) -> None:
        self.opens, self.works = opens, True
        self.got: list[int] = []
        self.answers = threading.Event()
        self.answers.set()

    def start(self) -> None:
        if not self.opens:
            raise ConnectionError("no route to host")

    def log(self, values: dict[str, float], step: int) -> None:
        self.answers.wait()
        if not self.works:
            raise ConnectionError("reset by peer")
        self.got.append(step)

    def finish(self) -> None:
        pass


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    tracker = Failing()

    class Remote(TrackerKind):
        install = "remote"
        when_offline = "unplug it"

        def build(self, about: About, known: dict[str, str]) -> Any:
            known["id"] = "7"
            return tracker

        def show(self, tracker: Any, name: str, pixels: Any, step: int) -> None:
            raise NotImplementedError

        def add(self, about: About, known: dict[str, str], rows: Any) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(TRACKERS, "remote", Remote)
    return tracker


def test_one_that_fails_midway_is_said_once_and_may_come_back(failing: Failing, tmp_path: Path) -> None:
    said: list[str] = []
    opened = open_trackers(["remote"], about(tmp_path), say=said.append)
    opened.log({"step": 1, "loss": 1.0})
    opened._threads[0].send(lambda _: setattr(failing, "works", False))
    opened.log({"step": 2, "loss": 1.0})
    opened.show("views", PICTURE, step=2)
    opened._threads[0].send(lambda _: setattr(failing, "works", True))
    opened.log({"step": 3, "loss": 1.0})
    opened.close()
    assert failing.got == [1, 3]
    assert [line.partition(" (")[0] for line in said] == [
        "warning: remote fails",
        "remote did not take 2 lines; metrics.jsonl has them all",
    ]
    assert "ConnectionError: reset by peer" in said[0]


def test_one_that_hangs_costs_no_step_and_not_the_end(
    failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSING_S", 0.05)
    said: list[str] = []
    opened = open_trackers(["remote"], about(tmp_path), say=said.append)
    failing.answers.clear()
    for step in range(1200):
        opened.log({"step": step, "loss": 1.0})
    opened.close()
    assert len(said) == 1
    assert "1000 lines are waiting" in said[0]
    failing.answers.set()


def test_one_that_does_not_open_is_refused_for_a_new_run_and_left_out_of_an_old_one(
    failing: Failing, tmp_path: Path
) -> None:
    failing.opens = False
    said: list[str] = []
    with pytest.raises(ValueError, match=r"--log.trackers remote cannot be opened \(no route to host\): unplug it, or"):
        open_trackers(["remote"], about(tmp_path), say=said.append)
    assert not (tmp_path / "trackers.json").exists()
    failing.opens = True
    open_trackers(["remote"], about(tmp_path), say=said.append).close()
    failing.opens = False
    assert not open_trackers(["remote"], about(tmp_path), say=said.append)
    add_rows(about(tmp_path), [(1, {"knn/top1": 0.5})], say=said.append)
    assert said == [
        "warning: remote cannot be opened (no route to host); the run goes on without it",
        "warning: remote did not take the figures (no route to host)",
    ]


def test_what_takes_nothing_beside_training_says_so(failing: Failing, tmp_path: Path) -> None:
    from shards.ground.locks import locked

    open_trackers(["remote"], about(tmp_path), say=print).close()
    said: list[str] = []
    with locked(tmp_path / "lock", holder="the run"):
        add_rows(about(tmp_path), [(1, {"knn/top1": 0.5})], say=said.append)
    assert said == ["note: remote takes nothing from here while the run goes on: evaluate again when it is over"]


def test_one_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(tuple(TRACKERS))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(ValueError, match=rf"--log.trackers {name}: .*pip install '?(moco-fast\[)?{name}"):
            check_installed((name,))


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    opened = open_trackers([], about(tmp_path), say=print)
    assert not opened
    opened.log({"step": 1, "loss": 1.0})
    opened.close()
    assert list(tmp_path.glob("*.json")) == []
    assert isinstance(opened, Trackers)
