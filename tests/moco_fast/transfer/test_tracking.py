"""What trackers are sent of trainings: TensorBoard's own files."""

import json
from pathlib import Path
from signal import SIGTERM

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_fast.cli import main
from moco_fast.stop import StopSignal
from tests.moco_fast.transfer.pixel_shapes import write_voc_pixels


def transfer(data: Path, out: Path, *words: str) -> int:
    given = ["--data", str(data), "--init", "random", "--network", "resnet18_quarter", "--out", str(out)]
    given += ["--batch-size", "2", "--steps", "6", "--crop", "33", "--threads", "1", "--device", "cpu"]
    return main(["transfer", "segment", *given, *words])


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_a_training_that_goes_on_goes_on_in_its_tracker(
    fresh_accelerator: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_voc_pixels(tmp_path / "VOC2012", {"train_aug": 4, "val": 2}).parent
    words = ("--trackers", "tensorboard")
    with monkeypatch.context() as patched:
        signals = iter([0, 0, 0, SIGTERM])
        patched.setattr(StopSignal, "poll", lambda self: next(signals))
        assert transfer(data, tmp_path / "out", *words) == 128 + SIGTERM
    assert transfer(data, tmp_path / "out", *words) == 0
    [folder] = (tmp_path / "out" / "trackers").iterdir()
    training = json.loads((tmp_path / "out" / "trainings" / f"{folder.name}.json").read_text())
    losses = points(folder, "train/loss")
    assert losses == [(step, pytest.approx(loss)) for step, loss in training["curve"]]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert points(folder, "train/lr")[0][1] > points(folder, "train/lr")[-1][1] > 0
    assert points(folder, "test/mIoU") == [(6, pytest.approx(training["figures"]["mIoU"]))]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    table = board.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| name | voc-semantic random seed 0 |" in table
    assert "| batch_size | 2 |" in table
    # What has been found is not trained again, nor sent.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert transfer(data, tmp_path / "out", *words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert transfer(tmp_path / "nowhere", tmp_path / "out", "--trackers", "wandb") == 2
    assert "--trackers wandb: wandb is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
