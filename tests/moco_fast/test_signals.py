"""Signals to a run: obeyed by all ranks after the same step, and in the middle of an evaluation."""

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from moco_fast import checkpoint, distributed, recovery
from moco_fast.config import CheckpointConfig
from moco_fast.evaluation import features, knn, retrieval
from moco_fast.evaluation.heads import LinearHeads
from moco_fast.interrupt import StoppedError, may_be_interrupted
from moco_fast.stop import StopSignal
from moco_fast.training import state
from moco_fast.training.heartbeat import RunLostError
from moco_fast.training.loop import train
from moco_fast.training.metrics import MetricsFile
from moco_fast.training.state import read_lines, run_state
from moco_fast.training.step import TrainStep
from tests.moco_fast.small_runs import small_run


def at_call(owner: Any, name: str, number: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Do something as a function is called for the n-th time; returns what puts the function back."""
    plain, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            action()
        assert calls[0] <= number + 3, "it went on in spite of the signal"
        return plain(*arguments, **options)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, plain)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def of_two(
    shards: str,
    out: str,
    evaluated: str | None,
    *,
    on_rank: int,
    where: tuple[Any, str, int],
    do: Any,
    tasks: tuple[str, ...] = ("health",),
) -> Any:
    """Train on this rank and the other; on one of them something is done at a moment."""
    config = small_run(Path(shards), Path(out), steps=2 if evaluated else 6)
    held_out = dataclasses.replace(config.eval, shards=evaluated, tasks=tasks if evaluated else ())
    config = dataclasses.replace(config, eval=held_out)
    put_back = at_call(*where, do) if distributed.rank() == on_rank else lambda: None
    rank = distributed.rank()
    try:
        return rank, train(config)
    finally:
        put_back()
        AcceleratorState._reset_state(reset_partial_state=True)


def told_while_it_trains(*places: Any) -> Any:
    # Under nohup it would be ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    return of_two(*places, None, on_rank=1, where=(TrainStep, "__call__", 3), do=send(signal.SIGHUP))


def told_while_it_evaluates(*places: Any) -> Any:
    # Rank 1 runs over 5 batches at step 0, and is told in the second of the last step.
    return of_two(*places, on_rank=1, where=(features, "layer_features", 7), do=send(signal.SIGTERM))


def goes_on(*places: Any) -> Any:
    return of_two(*places, on_rank=2, where=(features, "layer_features", 1), do=None)


def test_a_signal_to_one_rank_of_two_stops_both_after_the_same_step(
    run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path
) -> None:
    places = str(packed_demo.train), str(tmp_path / "run")
    assert run_ranks(told_while_it_trains, *places) == [(0, 128 + signal.SIGHUP), (1, 128 + signal.SIGHUP)]
    newest = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert newest is not None
    # It is agreed upon beside the next step.
    assert newest.name == "step-00000004"
    assert checkpoint.load(newest).numbers["loader"] == {"epoch": 0, "step": 4}
    assert run_state(tmp_path / "run") == "stopped"


def test_a_signal_to_one_rank_ends_an_evaluation_that_is_done_again(
    run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    places = str(packed_demo.train), str(out), str(packed_demo.val)
    assert run_ranks(told_while_it_evaluates, *places) == [(0, 128 + signal.SIGTERM), (1, 128 + signal.SIGTERM)]
    newest = checkpoint.find_newest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000002"
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "loss" not in line] == [0]
    assert run_ranks(goes_on, *places) == [(0, 0), (1, 0)]
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "loss" not in line] == [0, 2]


# Where a rank is in an evaluation.
PLACES = {
    "health": (features, "layer_features", 1),
    "knn": (knn, "predict", 1),
    "retrieval": (retrieval, "rank", 1),
    "linear": (LinearHeads, "step", 3),
}


def stuck_while_the_other_is_told(shards: str, out: str, held_out: str, task: str) -> Any:
    """The first rank is in an evaluation that has no end, and has the other one told, wherever that is by then."""
    pids = [os.getpid()] * 2
    dist.all_gather_object(pids, os.getpid())

    def get_stuck() -> None:
        os.kill(pids[1], signal.SIGTERM)
        assert threading.Event().wait(60), "no signal reached it"

    return of_two(shards, out, held_out, tasks=(task,), on_rank=0, where=PLACES[task], do=get_stuck)


@pytest.mark.parametrize("task", PLACES)
def test_a_signal_to_one_rank_reaches_the_others_wherever_they_are_in_an_evaluation(
    task: str, run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path
) -> None:
    places = str(packed_demo.train), str(tmp_path / "run"), str(packed_demo.val)
    told = run_ranks(stuck_while_the_other_is_told, *places, task)
    assert told == [(0, 128 + signal.SIGTERM), (1, 128 + signal.SIGTERM)]
    assert checkpoint.load(tmp_path / "run/checkpoints/step-00000000").numbers["is_evaluation_due"]


@pytest.mark.parametrize("task", PLACES)
def test_an_evaluation_of_a_run_is_left_at_once(task: str, packed_demo: Any, tmp_path: Path) -> None:
    config = small_run(packed_demo.train, tmp_path / "run", steps=2)
    evaluated = dataclasses.replace(config.eval, shards=str(packed_demo.val), tasks=(task,))
    put_back = at_call(*PLACES[task], send(signal.SIGINT))
    try:
        assert train(dataclasses.replace(config, eval=evaluated)) == 128 + signal.SIGINT
    finally:
        put_back()
    # Nothing was trained, and the first evaluation is still to be done.
    saved = checkpoint.load(tmp_path / "run/checkpoints/step-00000000")
    assert saved.numbers["is_evaluation_due"]
    assert json.loads((tmp_path / "run/outcome.json").read_text())["outcome"] == "stopped"


def state_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(out / f"checkpoints/step-{step:08d}")
    return {**saved.model, **saved.optimizer, **saved.rng}


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Event()
    receive = StopSignal._receive

    def hear(self: StopSignal, *arguments: Any) -> None:
        receive(self, *arguments)
        heard.set()

    def told_while_it_writes() -> None:
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(60)

    def run(out: str) -> int:
        saved = CheckpointConfig(every_steps=2, keep=9)
        return train(dataclasses.replace(small_run(packed_demo.train, tmp_path / out, steps=5), checkpoint=saved))

    assert run("plain") == 0
    monkeypatch.setattr(StopSignal, "_receive", hear)
    write, calls = checkpoint._write_tensors, []

    def write_and_be_told(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:  # The model is on the disk by then, the optimizer not yet.
            told_while_it_writes()
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_tensors", write_and_be_told)
    assert run("told") == 128 + signal.SIGTERM
    steps = [int(path.name.removeprefix("step-")) for path in recovery.candidates(tmp_path / "told/checkpoints")]
    assert steps[0] == 2
    assert 2 <= steps[-1] < 5
    for step in steps:
        recovery.verify(tmp_path / f"told/checkpoints/step-{step:08d}")
    assert [line["step"] for line in read_lines(tmp_path / "told/metrics.jsonl")] == list(range(1, steps[-1] + 1))
    assert run("told") == 0
    wanted, found = (state_of(tmp_path / out, 5) for out in ("plain", "told"))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_a_process_alone_grants_what_it_asks_for_once_and_gives_handlers_back() -> None:
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    stop = StopSignal(timeout_s=60)
    for what in (1, 3, 2):
        stop.ask(what)
    assert stop.granted() == 0
    stop.poll()
    assert [stop.granted(), stop.granted()] == [3, 0]
    stop.close()
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


def test_a_second_interrupt_does_not_wait_for_the_step() -> None:
    stop = StopSignal(timeout_s=60)
    try:
        signal.raise_signal(signal.SIGINT)
        assert stop.poll() == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()


@pytest.mark.parametrize("interrupts", [True, False])
def test_work_is_interrupted_only_where_that_is_asked_for(interrupts: bool) -> None:
    stop = StopSignal(timeout_s=60, interrupts=interrupts)
    was_interrupted = False
    try:
        with may_be_interrupted():
            signal.raise_signal(signal.SIGTERM)
    except StoppedError as stopped:
        was_interrupted = stopped.number == signal.SIGTERM
    finally:
        stop.close()
    assert was_interrupted == interrupts
    with may_be_interrupted():
        pass  # what was closed is forgotten


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(timeout_s=1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        stop.close()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopSignal(timeout_s=1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.poll() == signal.SIGHUP
        stop.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def folder_goes(shards: str, out: str) -> Any:
    state.BEAT_EVERY_S = 0.001
    move = lambda: Path(out).rename(f"{out}-moved")  # noqa: E731 - one of several moments
    try:
        of_two(shards, out, None, on_rank=0, where=(MetricsFile, "write", 1), do=move)
    except RunLostError as error:
        return str(error)
    finally:
        state.BEAT_EVERY_S = 30.0
    return None


@pytest.mark.faults
def test_a_folder_that_vanishes_ends_all_ranks(run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path) -> None:
    said = run_ranks(folder_goes, str(packed_demo.train), str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "was deleted, moved or replaced" in said[0]
    assert not (tmp_path / "run").exists()
