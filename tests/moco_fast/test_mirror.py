"""The mirror of a run in a bucket, against an S3 server on this machine."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import CheckpointConfig
from moco_fast.saving.mirror import Mirror, MirrorLostError, open_mirror
from moco_fast.saving.saver import Need, Saver
from moco_fast.training.loop import train
from shards.ground.errors import PackError
from shards.storage.stores import Folder
from tests.moco_fast.small_runs import small_run

pytestmark = pytest.mark.faults

CONFIG = CheckpointConfig(keep=2, keep_every=4)


class Started:
    """A start of a run: its folder, its mirror and its saver."""

    def __init__(self, run: Path, address: str) -> None:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.run, self.said = run, list[str]()
        self.mirror = open_mirror(address, run, CONFIG)
        self.saver = Saver(
            run / "checkpoints",
            CONFIG,
            torch.device("cpu"),
            timeout_s=60,
            mirror=self.mirror,
            say=self.said.append,
        )

    def save(self, step: int, *, best: int | None = None) -> None:
        (self.run / "metrics.jsonl").write_text("".join(f'{{"step": {each}}}\n' for each in range(1, step + 1)))
        model = {"weight": torch.full((3,), float(step)), "watched.sums": torch.ones(1)}
        self.saver.save(Checkpoint(step=step, config={}, model=model, optimizer={}, rng={}), best=best)

    def finish(self) -> None:
        try:
            self.saver.finish()
        finally:
            self.saver.close()


def in_mirror(address: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, _ in Folder(address).objects():
        folder, _, file = name.removeprefix("checkpoints/").rpartition("/")
        if name.startswith("checkpoints/step-"):
            found.setdefault(folder, set()).add(file)
    return found


FILES = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}


def test_another_machine_goes_on_from_the_mirror(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/runs/first"
    started = Started(tmp_path / "a", address)
    for step in range(1, 8):
        started.save(step, best=3 if step >= 3 else None)
        started.saver.writing.result()
        started.mirror.wait()
    started.finish()
    kept = {f"step-{step:08d}" for step in (3, 4, 6, 7)}
    assert {path.name for path in (tmp_path / "a/checkpoints").glob("step-*")} == kept
    assert in_mirror(address) == dict.fromkeys(kept, FILES)
    assert started.said == []
    other = Started(tmp_path / "b", address)
    newest = checkpoint.find_newest(tmp_path / "b/checkpoints")
    assert newest is not None
    assert checkpoint.load(newest).model["weight"].tolist() == [7.0] * 3
    assert checkpoint.load(tmp_path / "b/checkpoints/best").step == 3
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == (tmp_path / "a/metrics.jsonl").read_bytes()
    other.save(8)
    other.finish()
    assert set(in_mirror(address)) == {f"step-{step:08d}" for step in (3, 4, 7, 8)}
    # The first machine comes back, with a folder that is behind.
    again = Started(tmp_path / "a", address)
    assert checkpoint.find_newest(tmp_path / "a/checkpoints") == tmp_path / "a/checkpoints/step-00000008"
    again.finish()


def test_a_start_that_lives_on_ends_when_another_has_taken_over(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/run"
    first = Started(tmp_path / "a", address)
    first.save(1)
    first.saver.finish()
    second = Started(tmp_path / "b", address)
    first.save(2)
    with pytest.raises(OSError, match=f"another start of this run writes to {address}"):
        first.saver.finish()
    assert first.saver.needs() == Need.END
    first.saver.close()
    assert isinstance(first.mirror.lost, MirrorLostError)
    second.save(2)
    second.finish()
    assert set(in_mirror(address)) == {"step-00000001", "step-00000002"}


def test_the_mirror_of_another_run_is_refused(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/run"
    first = Started(tmp_path / "a", address)
    first.save(1)
    first.finish()
    stranger = Started(tmp_path / "b", f"{bucket}/other")
    stranger.save(5)
    stranger.finish()
    with pytest.raises(ValueError, match=f"{address} holds another run than {tmp_path / 'b'}: choose another address"):
        Started(tmp_path / "b", address)
    (tmp_path / "b/mirror-id").unlink()
    with pytest.raises(ValueError, match="holds another run"):
        Started(tmp_path / "b", address)
    assert set(in_mirror(address)) == {"step-00000001"}


def test_an_upload_that_fails_is_told_and_tried_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{bucket}/run"
    started = Started(tmp_path / "a", address)

    def refuse(*_: Any, **__: Any) -> bool:
        raise PackError("cannot write: SlowDown")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", refuse)
        started.save(1)
        started.saver.writing.result()
        assert started.mirror.uploading is not None
        started.mirror.uploading.result()
        assert started.saver.needs() == Need.NOTHING
        assert started.said == ["mirror: cannot write: SlowDown; the next checkpoint tries again"]
    started.save(2)
    started.saver.finish()
    assert set(in_mirror(address)) == {"step-00000001", "step-00000002"}
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", refuse)
        started.save(3)
        with pytest.raises(
            OSError, match=r"the last checkpoint is in .*checkpoints, but not in the mirror: cannot write"
        ):
            started.finish()


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("number", range(0, 40, 6))
def test_a_kill_at_any_request_leaves_a_whole_checkpoint(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    address, calls = f"{bucket}/run", 0
    run, config = tmp_path / "a", CheckpointConfig(keep=1)
    started = Started(run, address)
    started.save(1, best=1)
    started.finish()

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Folder, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number:
                raise KilledError
            return function(self, *arguments, **options)

        return call

    model = {"weight": torch.full((3,), 2.0)}
    checkpoint.save(
        run / "checkpoints", Checkpoint(step=2, config={}, model=model, optimizer={}, rng={}), keep=1, best=2
    )
    mirror = Mirror(address, run, config)
    mirror.claim()
    with monkeypatch.context() as patch:
        for name in ("put", "delete"):
            patch.setattr(Folder, name, killing(getattr(Folder, name)))
        mirror.offer()
        assert mirror.uploading is not None
        killed = mirror.uploading.exception()
    mirror.close()
    assert isinstance(killed, KilledError) == (calls > number)
    other = Started(tmp_path / "b", address)
    newest = checkpoint.find_newest(tmp_path / "b/checkpoints")
    assert newest is not None
    read = checkpoint.load(newest)
    assert read.model["weight"].tolist() == [float(read.step)] * 3
    best = checkpoint.best_step(tmp_path / "b/checkpoints")
    assert best is None or checkpoint.load(tmp_path / "b/checkpoints/best").step == best
    other.save(3)
    other.finish()
    whole = in_mirror(address)
    assert "step-00000003" in whole
    assert all(files == FILES for files in whole.values())


@pytest.mark.slow
def test_a_run_goes_on_in_an_empty_folder(
    bucket: str, packed_demo: Any, tmp_path: Path, fresh_accelerator: Any
) -> None:
    def config(out: Path, steps: int) -> Any:
        saved = CheckpointConfig(every_steps=2, mirror=f"{bucket}/run")
        whole = small_run(packed_demo.train, out, steps=4, allow_changes=("run.steps",))
        return dataclasses.replace(whole, checkpoint=saved, run=dataclasses.replace(whole.run, steps=steps))

    assert train(config(tmp_path / "a", 3)) == 0
    shutil.rmtree(tmp_path / "a")
    assert train(config(tmp_path / "b", 4)) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    content = {name: Folder(f"{bucket}/run").read(name) for name in ("metrics.jsonl", "outcome.json")}
    assert json.loads(content["outcome.json"])["outcome"] == "finished"
    assert content["metrics.jsonl"] == (tmp_path / "b/metrics.jsonl").read_bytes()
