import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.config import CheckpointConfig, Config
from moco_fast.report.record import read_run
from moco_fast.report.words import environment_table
from moco_fast.saving.mirror import open_mirror
from moco_fast.training.branching import find_branch
from moco_fast.training.continuing import identity_of
from moco_fast.training.folder import RunFolder, open_folder
from moco_fast.training.loop import train
from tests.moco_fast.small_runs import small_run


def run_in(folder: Path, shards: Path, *, steps: int = 4, lr: float | None = None, **run: Any) -> Config:
    config = small_run(shards, folder, steps=steps, **run)
    optim = config.optim if lr is None else dataclasses.replace(config.optim, lr=lr)
    return dataclasses.replace(config, optim=optim, checkpoint=CheckpointConfig(every_steps=2, keep=5))


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def source(packed_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("branching") / "first"
    assert train(run_in(folder, packed_demo.train)) == 0
    return folder


def test_a_branch_goes_on_as_its_source_did(
    source: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(source)
    branch = tmp_path / "branch"
    assert train(run_in(branch, packed_demo.train, branch_from=f"{source}@2")) == 0
    assert f"began with the checkpoint of step 2 of {source}@2" in capsys.readouterr().err
    assert files(source) == before
    ours, theirs = (checkpoint.load(folder / "checkpoints/step-00000004") for folder in (branch, source))
    for part in ("model", "optimizer", "rng"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), part
    assert ours.numbers["loader"] == theirs.numbers["loader"] == {"epoch": 0, "step": 4}
    losses = [
        {line["step"]: line["loss"] for text in (folder / "metrics.jsonl").read_text().splitlines()
         if "loss" in (line := json.loads(text))}
        for folder in (branch, source)
    ]  # fmt: skip
    assert losses[0] == {step: loss for step, loss in losses[1].items() if step > 2}
    assert ("Branch of", f"{source}@2") in environment_table(read_run(branch))
    assert json.loads((branch / "branch.json").read_text())["step"] == 2


def test_a_branch_differs_only_in_what_is_named_and_is_then_a_run_of_its_own(
    source: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = tmp_path / "branch"
    other = {"steps": 5, "lr": 0.5, "branch_from": str(source)}
    with pytest.raises(ValueError, match=r"had other settings \(--optim\.lr: 0\.06 -> 0\.5; --run\.steps: 4 -> 5\)"):
        train(run_in(branch, packed_demo.train, **other))
    assert not branch.exists()
    named = other | {"allow_changes": ("optim.lr", "run.steps")}
    assert train(run_in(branch, packed_demo.train, **named)) == 0
    assert "changed, as --run.allow-changes says: --optim.lr: 0.06 -> 0.5" in capsys.readouterr().err
    [line] = map(json.loads, (branch / "changes.jsonl").read_text().splitlines())
    assert (line["step"], len(line["allowed"])) == (4, 2)
    assert checkpoint.find_newest(branch / "checkpoints") == branch / "checkpoints/step-00000005"
    # Without its source, and without the option.
    for again in (named, {"steps": 5, "lr": 0.5}):
        assert train(run_in(branch, packed_demo.train, **again)) == 0
    with pytest.raises(ValueError, match=r"began with that of .*first: name another one"):
        train(run_in(branch, packed_demo.train, **(named | {"branch_from": f"{source}@2"})))
    with pytest.raises(ValueError, match="began without another run's checkpoint"):
        train(run_in(source, packed_demo.train, branch_from=str(branch)))


@pytest.mark.parametrize(
    ("reference", "step"),
    [("{run}", 4), ("{run}@4", 4), ("{run}@2", 2), ("{run}@best", 2), ("{run}/checkpoints/step-00000002", 2)],
)
def test_a_checkpoint_is_named_by_its_run(
    reference: str, step: int, source: Path, packed_demo: Any, tmp_path: Path
) -> None:
    there = tmp_path / "a@2"
    shutil.copytree(source, there)
    (there / "checkpoints/best").symlink_to("step-00000002")
    found = find_branch(run_in(tmp_path / "b", packed_demo.train, branch_from=reference.format(run=there)), {})
    assert found is not None
    assert (found.step, found.source) == (step, there / f"checkpoints/step-{step:08d}")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("{run}@3", "there is no such checkpoint in .*: it has steps 2, 4"),
        ("{run}@best", "there is no such checkpoint"),
        ("nowhere", "nowhere holds no checkpoint: give the folder of a run"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(
    reference: str, says: str, source: Path, packed_demo: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        find_branch(run_in(tmp_path / "b", packed_demo.train, branch_from=reference.format(run=source)), {})
    with pytest.raises(ValueError, match=r"is in --run\.out"):
        find_branch(run_in(source.parent, packed_demo.train, branch_from=str(source)), {})


@pytest.mark.faults
def test_a_branch_goes_on_from_its_mirror_where_its_source_is_not(
    source: Path, packed_demo: Any, bucket: str, tmp_path: Path
) -> None:
    def on(machine: str, address: str = f"{bucket}/branch", reference: str = f"{tmp_path}/first@2") -> Config:
        config = run_in(tmp_path / machine / "branch", packed_demo.train, branch_from=reference)
        return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, mirror=address))

    def opened(config: Config) -> RunFolder:
        folder = open_folder(config, {}, find_branch(config, {}))
        assert folder.mirror is not None
        folder.mirror.offer()
        folder.mirror.wait()
        folder.mirror.close()
        folder.close()
        return folder

    shutil.copytree(source, tmp_path / "first")
    opened(on("a"))
    # The mirror of the source, as --config first/config.json has it.
    theirs = open_mirror(f"{bucket}/first", tmp_path / "first", CheckpointConfig())
    theirs.offer()
    theirs.wait()
    theirs.close()
    for address, reference, how in (
        (f"{bucket}/first", f"{tmp_path}/first@2", "without another run's checkpoint"),
        (f"{bucket}/branch", f"{tmp_path}/first@4", "with that of .*first@2"),
    ):
        with pytest.raises(ValueError, match=f"the run in --checkpoint.mirror {address} began {how}"):
            find_branch(on("c", address, reference), {})
    shutil.rmtree(tmp_path / "first")
    for _ in range(2):  # where nothing is, and again there
        folder = opened(on("b"))
        assert folder.found.newest == tmp_path / "b/branch/checkpoints/step-00000002"
        assert (folder.path / "branch.json").read_bytes() == (tmp_path / "a/branch/branch.json").read_bytes()


def test_other_samples_are_refused(source: Path, packed_demo: Any, tmp_path: Path) -> None:
    from moco_fast.training.build import open_sets

    config = run_in(tmp_path / "b", packed_demo.val, branch_from=str(source))
    with pytest.raises(ValueError, match=r"holds other samples: 288 samples.* --run\.allow-changes data\.shards$"):
        find_branch(config, identity_of(open_sets(config)))


def test_a_damaged_source_is_refused(source: Path, packed_demo: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    with (damaged / "checkpoints/step-00000004/model.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"damage")
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        train(run_in(tmp_path / "b", packed_demo.train, branch_from=str(damaged)))
