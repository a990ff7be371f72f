"""Saving beside training: what is copied when, who waits for whom, and what a failure does."""

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import CheckpointConfig
from moco_fast.saving import staging
from moco_fast.saving.due import Due, best_interval, describe
from moco_fast.saving.saver import Need, Saver
from moco_fast.saving.staging import Staging
from moco_fast.stop import StopSignal
from moco_fast.training.loop import train
from tests.moco_fast.small_runs import small_run

CPU = torch.device("cpu")


def state_of(step: int, value: float, sums: float = 1.0) -> Checkpoint:
    model = {"query.weight": torch.full((3, 2), value), "watched.sums": torch.full((2, 1), sums)}
    optimizer = {"momentum_buffer/weight": torch.full((3, 2), -value)}
    return Checkpoint(step=step, config={}, model=model, optimizer=optimizer, rng={}, numbers={"at": step})


def saver_in(folder: Path, **options: Any) -> Saver:
    options = {"config": CheckpointConfig(), "device": CPU, "timeout_s": 60.0, "say": lambda line: None} | options
    return Saver(folder, options.pop("config"), options.pop("device"), **options)


class Gate:
    """Holds the thread that writes until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)


def test_a_step_that_follows_does_not_reach_what_is_written(tmp_path: Path) -> None:
    gate = Gate()
    saver = saver_in(tmp_path, before=gate)
    state = state_of(7, 0.5)
    saver.save(state)
    for tensor in (*state.model.values(), *state.optimizer.values()):
        tensor.fill_(99.0)
    torch.rand(1)
    assert gate.reached.wait(60)
    assert checkpoint.find_newest(tmp_path) is None
    gate.opened.set()
    saver.finish()
    saver.close()
    read = checkpoint.load(tmp_path / "step-00000007")
    assert read.model["query.weight"].unique().tolist() == [0.5]
    assert read.optimizer["momentum_buffer/weight"].unique().tolist() == [-0.5]
    assert read.numbers == {"at": 7}
    assert set(read.rng) == {"0.cpu"}


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path: Path) -> None:
    gate, said = Gate(), list[str]()
    saver = saver_in(tmp_path, before=gate, say=said.append, config=CheckpointConfig(keep=5))
    saver.save(state_of(1, 1.0))
    assert gate.reached.wait(60)
    threading.Timer(0.05, gate.opened.set).start()
    saver.save(state_of(2, 2.0))  # would else overwrite the copy that is being written
    saver.save(state_of(3, 3.0))
    saver.finish()
    saver.close()
    for step in (1, 2, 3):
        read = checkpoint.load(tmp_path / f"step-{step:08d}")
        assert read.model["query.weight"].unique().tolist() == [float(step)]
    assert "the one before was still being written" in said[0]


def test_one_copy_is_kept_and_used_again(tmp_path: Path) -> None:
    kept = Staging(CPU)
    tensors = {"a": torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last), "b": torch.tensor(3)}
    first = dict(kept.copy(tensors))
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert all(
        torch.equal(first[name], each) and first[name].stride() == each.stride() for name, each in tensors.items()
    )
    again = kept.copy({name: tensor + 1 for name, tensor in tensors.items()})
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == addresses
    assert torch.equal(again["a"], tensors["a"] + 1)
    other = kept.copy({"a": torch.rand(2)})
    assert set(other) == {"a"}
    assert other["a"].shape == (2,)


def test_without_memory_for_a_copy_training_waits_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda: 1 << 20)
    said, threads = list[str](), list[str]()
    saver = saver_in(tmp_path, say=said.append, before=lambda: threads.append(threading.current_thread().name))
    for step in (1, 2):
        saver.save(state_of(step, float(step)))
        assert checkpoint.find_newest(tmp_path) == tmp_path / f"step-{step:08d}"
    saver.finish()
    saver.close()
    assert threads == [threading.main_thread().name] * 2
    [line] = said
    assert "training waits while they are written" in line
    assert "1.05 MB of memory are free" in line


def test_free_memory_is_that_of_the_machine_or_less() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < staging.free_bytes() <= total


@pytest.mark.faults
def test_a_failed_write_is_told_and_not_covered_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_in(tmp_path)
    saver.save(state_of(1, 1.0))
    saver.finish()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        saver.save(state_of(2, 2.0))
        with pytest.raises(OSError, match="No space left"):
            saver.finish()
    assert saver.needs() == Need.END
    saver.save(state_of(3, 3.0))
    with pytest.raises(OSError, match="No space left"):
        saver.end()
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.faults
def test_what_the_disk_gives_back_is_compared_with_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "sync", flip_a_bit)
    with pytest.raises(OSError, match=r"model\.safetensors is not what was written when it is read back"):
        checkpoint.save(tmp_path, state_of(1, 1.0), keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_what_is_compared_comes_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def recorded(name: str) -> Callable[[Path], Any]:
        function = getattr(checkpoint, name)

        def call(path: Path) -> Any:
            calls.append((path.name, name))
            return function(path)

        return call

    for name in ("sync", "uncache", "fingerprint"):
        monkeypatch.setattr(checkpoint, name, recorded(name))
    checkpoint.save(tmp_path, state_of(1, 1.0), keep=1)
    for file in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        # Only what is synced can leave the kernel's memory, and training needs that memory for shards.
        assert [name for path, name in calls if path == file] == ["sync", "uncache", "fingerprint", "uncache"]


def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    saver.save(state_of(4, 1.0, sums=math.nan))
    with pytest.raises(FloatingPointError, match="no longer a number before step 4"):
        saver.finish()
    saver.close()
    assert checkpoint.find_newest(tmp_path) is None


NUM_OPERATIONS = 64
"""More than a save takes."""


@pytest.mark.faults
@pytest.mark.parametrize("number", range(NUM_OPERATIONS))
def test_a_kill_at_any_operation_of_the_thread_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import os

    saver = saver_in(tmp_path, config=CheckpointConfig(keep=1))
    saver.save(state_of(1, 1.0), best=1)
    saver.finish()
    calls = 0

    class KilledError(BaseException):
        pass

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > number:
                raise KilledError
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "unlink"):
            patch.setattr(os, name, killing(getattr(os, name)))
        saver.save(state_of(2, 2.0), best=2)
        assert saver.writing is not None
        error = saver.writing.exception()
    saver.close()
    assert isinstance(error, KilledError) == (calls > number)
    assert error is not None or number > 20
    assert error is None or number < NUM_OPERATIONS - 1
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    for path in (newest, tmp_path / "best"):
        read = checkpoint.load(path)
        assert read.model["query.weight"].unique().tolist() == [float(read.step)]
    assert error is not None or newest.name == "step-00000002"


@given(st.sets(st.integers(1, 300)), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 60)))
@example({5, 10, 15, 20, 25}, 1, 10)  # what is kept for good has just such a step
def test_what_is_kept_stays_kept(steps: set[int], keep: int, keep_every: int | None) -> None:
    kept: list[int] = []
    for step in sorted(steps):
        kept.append(step)
        gone = checkpoint.superfluous(kept, keep=keep, keep_every=keep_every)
        kept = [each for each in kept if each not in gone]
    ordered = sorted(steps)
    expected = set(ordered[-keep:])
    if keep_every is not None:
        for start in range(keep_every, 301, keep_every):
            inside = [step for step in ordered if start <= step < start + keep_every]
            expected |= set(inside[:1])
    assert set(kept) == expected


@given(st.floats(0.01, 100.0), st.floats(1000.0, 1e6))
def test_the_best_interval_costs_least(cost_s: float, failures_s: float) -> None:
    def waste(interval: float) -> float:
        # Daly 2006, eq. 20: the whole time of a run, by that without failures, with restarts that take no time.
        return failures_s * math.expm1((interval + cost_s) / failures_s) / interval

    best = best_interval(cost_s, failures_s)
    grid = [best * (1 + change) for change in (-0.3, -0.1, 0.1, 0.3)]
    assert all(waste(best) <= waste(other) * (1 + 1e-6) for other in grid)
    assert best == pytest.approx(math.sqrt(2 * cost_s * failures_s), rel=0.25)


def test_auto_saves_after_a_minute_and_then_by_the_cost() -> None:
    now = 0.0
    due = Due(CheckpointConfig(every="auto", failure_hours=10), clock=lambda: now)
    assert not due.by_steps(1000)
    now = 59.0
    assert not due.by_time()
    now = 60.0
    assert due.by_time()
    due.began()
    assert not due.by_time()
    said = due.measured(cost_s=0.5, write_s=3.0)
    interval = best_interval(0.5, 36_000)
    assert said is not None
    assert "every 3 min 9 s, since training stands still for 0.5 s" in said
    assert due.measured(cost_s=0.5, write_s=3.0) is None
    now = 60 + interval - 1
    assert not due.by_time()
    now = 60 + interval + 1
    assert due.by_time()
    due.measured(cost_s=0.5, write_s=10_000.0)
    assert not due.by_time()


def test_a_save_by_time_is_asked_for_once_each_time_it_is_due(tmp_path: Path) -> None:
    said, now, config = list[str](), 0.0, CheckpointConfig(every="auto")
    saver = saver_in(tmp_path, config=config, say=said.append)
    saver.due = Due(config, clock=lambda: now)
    assert saver.needs() == Need.NOTHING
    now = 61.0
    assert [saver.needs(), saver.needs()] == [Need.SAVE, Need.NOTHING]
    began = time.perf_counter()
    saver.save(state_of(1, 1.0))
    saver.finish()
    assert saver.writing is not None
    assert 0 < saver.writing.result() < time.perf_counter() - began
    assert said == []
    assert [saver.needs(), saver.needs()] == [Need.NOTHING, Need.NOTHING]
    [line] = said
    assert "since training stands still for" in line
    now = 1e6
    assert [saver.needs(), saver.needs()] == [Need.SAVE, Need.NOTHING]
    saver.close()


def test_by_steps_and_by_time_together() -> None:
    now = 0.0
    due = Due(CheckpointConfig(every_steps=10, every_minutes=2), clock=lambda: now)
    assert [step for step in range(1, 31) if due.by_steps(step)] == [10, 20, 30]
    now = 121.0
    assert due.by_time()
    due.began()
    assert not due.by_time()
    only_by_time = Due(CheckpointConfig(every_steps=None, every_minutes=2), clock=lambda: now)
    assert not any(only_by_time.by_steps(step) for step in range(1, 31))
    assert "every 10 steps and every 2 min; kept: the newest 2, one for every 50 steps" in describe(
        CheckpointConfig(every_steps=10, every_minutes=2, keep_every=50)
    )


def save_on_two_ranks(folder: str, fails: bool) -> dict[str, Any]:
    """Train nothing for ten steps; by the first rank's clock a save is due after the third."""
    rank, stop = dist.get_rank(), StopSignal(timeout_s=60)
    torch.manual_seed(rank)
    gate = Gate()
    saver = saver_in(Path(folder), before=gate, config=CheckpointConfig(every_steps=None, every_minutes=1))
    saved, error, waited, now = [], "", False, 0.0
    saver.due = Due(CheckpointConfig(every_minutes=1), clock=lambda: now)
    try:
        for step in range(1, 11):
            if rank == 0:
                now = 61.0 if step >= 3 else 0.0
                stop.ask(saver.needs())
            stop.poll()
            granted = stop.granted()
            if granted == Need.END:
                saver.end()
            if granted == Need.SAVE:
                saver.save(state_of(step, float(step), sums=math.nan if fails else 1.0) if rank == 0 else None)
                saved.append(step)
                # The other rank is past the save although nothing can be written yet.
                dist.barrier()
                waited = gate.opened.is_set()
                gate.opened.set()
                if fails and rank == 0:
                    saver.writing.exception()  # pyright: ignore[reportOptionalMemberAccess] - it has just begun
        saver.finish()
    except FloatingPointError as caught:
        error = str(caught)
    saver.close()
    stop.close()
    return {"saved": saved, "error": error, "waited": waited, "state": torch.get_rng_state().sum().item()}


def test_two_ranks_save_at_the_same_step_and_neither_waits_for_the_disk(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(save_on_two_ranks, str(tmp_path), False)
    assert first["saved"] == second["saved"] == [4]
    assert not first["waited"]
    assert not second["waited"]
    read = checkpoint.load(tmp_path / "step-00000004")
    assert {name: tensor.sum().item() for name, tensor in read.rng.items()} == {
        "0.cpu": first["state"],
        "1.cpu": second["state"],
    }


@pytest.mark.faults
def test_a_failed_write_ends_both_ranks_with_its_reason(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(save_on_two_ranks, str(tmp_path), True)
    assert first["error"] == second["error"] == "the loss is no longer a number before step 4, which is not saved"
    assert first["saved"] == second["saved"] == [4]
    assert checkpoint.find_newest(tmp_path) is None


def test_a_run_that_cannot_write_fails_with_the_reason(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    config = small_run(packed_demo.train, tmp_path / "run", steps=40)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=2))
    save, steps = checkpoint.save, []

    def full(folder: Path, state: Checkpoint, **options: Any) -> Path:
        steps.append(state.step)
        if state.step == 4:
            raise OSError(28, "No space left on device")
        return save(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(config)
    assert steps == [2, 4]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    outcome = json.loads((tmp_path / "run/outcome.json").read_text())
    assert outcome["outcome"] == "failed"
    assert "No space left on device" in outcome["error"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert 4 <= json.loads(lines[-1])["step"] < 40
