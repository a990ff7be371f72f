"""What a run leaves on the disk when the power is cut, whatever the disk makes of what was not synced."""

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import to_dict
from moco_fast.recovery import find_whole
from moco_fast.training.folder import RunFolder
from moco_fast.training.metrics import MetricsFile
from moco_fast.training.trackers import Trackers
from shards.ground import files
from tests.forgetful import NAMES, ForgetfulDisk
from tests.moco_fast.small_runs import small_run

pytestmark = pytest.mark.faults


@contextmanager
def cut_anywhere(root: Path, scratch: Path, check: Callable[[Path], None]) -> Generator[Callable[[], None]]:
    """Call `check` with what a cut would leave of `root`, after every change within the block; gives one more cut."""
    disk, is_checking = ForgetfulDisk(root), False

    def cut() -> None:
        nonlocal is_checking
        if is_checking:
            return
        is_checking = True
        for names in NAMES:
            check(disk.after_a_cut(scratch, names))
            shutil.rmtree(scratch)
        is_checking = False

    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch, cut)
        try:
            yield cut
        finally:
            patch.undo()
            disk.close()


def make(step: int) -> Checkpoint:
    weights = {"weight": torch.full((3,), float(step))}
    return Checkpoint(step=step, config={}, model=weights, optimizer={}, rng={}, numbers={"step": step})


def save_some(tmp_path: Path) -> int:
    """Save checkpoints with cuts everywhere; return how many there were."""
    root, saved, best, num_cuts = tmp_path / "run", 0, None, 0
    root.mkdir()

    def check(left: Path) -> None:
        nonlocal num_cuts
        num_cuts += 1
        checkpoints = sorted(left.glob("step-*"))
        for each in checkpoints:
            assert checkpoint.load(each).model["weight"].tolist() == [float(each.name[5:])] * 3
        newest = checkpoint.find_newest(left)
        assert saved == 0 or (newest is not None and checkpoint.load(newest).step >= saved)
        assert best is None or (checkpoint.load(left / "best").step >= best and checkpoint.best_step(left) is not None)

    with cut_anywhere(root, tmp_path / "left", check) as cut:
        for step, best_now in ((1, 1), (2, 1), (3, 3), (4, 3)):
            checkpoint.save(root, make(step), keep=1, best=best_now)
            saved, best = step, best_now
            cut()
    return num_cuts


def test_every_checkpoint_with_a_name_is_whole_after_a_power_cut(tmp_path: Path) -> None:
    assert save_some(tmp_path) > 100


def test_a_copied_checkpoint_is_whole_after_a_power_cut(tmp_path: Path) -> None:
    source = checkpoint.save(tmp_path / "source", make(7), keep=1)
    root, is_copied = tmp_path / "run", False
    root.mkdir()

    def check(left: Path) -> None:
        assert is_copied <= (left / source.name).exists()
        for each in left.glob("step-*"):
            read = checkpoint.load(each)
            assert (read.model["weight"].tolist(), read.numbers) == ([7.0] * 3, {"step": 7, "branch": True})

    with cut_anywhere(root, tmp_path / "left", check) as cut:
        checkpoint.copy(source, root, branch=True)
        is_copied = True
        cut()


class SyncsNothing:
    """A mutant of `os.fsync` that leaves out the syncs of files, or of folders."""

    def __init__(self, is_left_out: Callable[[Path], bool]) -> None:
        self._sync, self._is_left_out = files.sync, is_left_out

    def __call__(self, path: Path) -> None:
        if not self._is_left_out(path):
            self._sync(path)


@pytest.mark.parametrize(
    "is_left_out",
    [Path.is_file, lambda path: path.is_dir() and ".partial" in path.name, lambda path: path.name == "run"],
    ids=["of files", "of the checkpoint's folder", "of the folder of checkpoints"],
)
def test_a_sync_that_is_left_out_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_left_out: Callable[[Path], bool]
) -> None:
    mutant = SyncsNothing(is_left_out)
    monkeypatch.setattr(files, "sync", mutant)
    monkeypatch.setattr(checkpoint, "sync", mutant)
    with pytest.raises((AssertionError, ValueError)):
        save_some(tmp_path)


def test_configuration_and_history_survive_a_power_cut(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    lines = [{"step": step, "loss": 1.0} for step in range(1, 7)]
    files.write_synced(root / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    (root / "config.json").write_text('{"old": 1}')
    config = small_run(Path("shards"), root, steps=4)
    expected, steps = json.loads(json.dumps(to_dict(config))), [1, 2, 3, 4]

    def check(left: Path) -> None:
        assert json.loads((left / "config.json").read_text()) in ({"old": 1}, expected)
        kept = [json.loads(line)["step"] for line in (left / "metrics.jsonl").read_text().splitlines()]
        assert kept[: len(steps)] == steps

    with cut_anywhere(root, tmp_path / "left", check) as cut:
        folder = RunFolder(root, (root / "lock").open("wb"), find_whole(root / "checkpoints"), None)
        folder.write_config(config)
        metrics = MetricsFile(root, step=4, trackers=Trackers())
        cut()
        metrics.write({"step": 5, "loss": 2.0})
        metrics.sync()
        steps.append(5)
        cut()
        metrics.close()
        folder.close()
    assert json.loads((root / "config.json").read_text()) == expected
