"""The checkpoint with the best value of a figure, whatever happens to a run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import CheckpointConfig, Config, EvalConfig, ModelConfig, OptimConfig
from moco_fast.encoders.open import open_encoder
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want
from moco_fast.evaluation.registry import TASKS
from moco_fast.presets import PRESETS
from moco_fast.report.record import read_run
from moco_fast.report.words import headline
from moco_fast.training.best import Best, best_of
from moco_fast.training.loop import train


def saved(folder: Path, step: int, *, best: int | None) -> None:
    weights = {"weight": torch.full((2,), float(step))}
    checkpoint.save(folder, Checkpoint(step=step, config={}, model=weights, optimizer={}, rng={}), keep=2, best=best)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=20), st.booleans())
def test_the_best_is_the_first_of_the_best_values(values: list[float | None], is_lowest: bool) -> None:
    best = Best(figure="a", is_lowest=is_lowest)
    known = {step: value for step, value in enumerate(values, 1) if value is not None}
    taken = [step for step, value in known.items() if best.takes({"a": value}, step=step)]
    numbers = {step: value for step, value in known.items() if not math.isnan(value)}
    expected = (min if is_lowest else max)(numbers.values(), default=None)
    assert best.step == next((step for step, value in numbers.items() if value == expected), None)
    assert taken == sorted(taken)
    assert (taken or [None])[-1] == best.step
    again = Best(figure="a", is_lowest=is_lowest)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again == best or best.step is None
    other = Best(figure="b", is_lowest=is_lowest)
    other.load_state_dict(best.state_dict())
    assert other.step is None


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        saved(tmp_path, step, best=best)
        assert checkpoint.best_step(tmp_path) == best
    assert steps_of(tmp_path) == [2, 4, 5]
    assert checkpoint.load(tmp_path / "best").step == 2
    saved(tmp_path, 6, best=None)  # a start that does not ask for it removes nothing
    assert steps_of(tmp_path) == [2, 5, 6]
    saved(tmp_path, 6, best=6)  # a run that stops as soon as it has resumed
    saved(tmp_path, 7, best=6)
    saved(tmp_path, 8, best=7)
    assert (steps_of(tmp_path), checkpoint.best_step(tmp_path)) == ([7, 8], 7)
    assert checkpoint.find_newest(tmp_path) == tmp_path / "step-00000008"


@pytest.mark.faults
@pytest.mark.parametrize("at", ["symlink_to", "replace", "rename"])
def test_killed_between_any_two_steps_a_best_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    class KilledError(BaseException):
        pass

    for step in (1, 2, 3):
        saved(tmp_path, step, best=1)
    plain, calls = getattr(Path, at), 0

    def killed(self: Path, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        # `replace` names the checkpoint first, then the link.
        if at == "replace" and calls == 1:
            return plain(self, *arguments)
        raise KilledError

    monkeypatch.setattr(Path, at, killed)
    with pytest.raises(KilledError):
        saved(tmp_path, 4, best=4)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "best").step == (4 if at == "rename" else 1)
    assert checkpoint.load(tmp_path / "step-00000004").step == 4
    checkpoint.sweep(tmp_path)
    saved(tmp_path, 5, best=4)
    assert (steps_of(tmp_path), checkpoint.best_step(tmp_path)) == ([4, 5], 4)
    assert not list(tmp_path.glob(".*"))


VALUES: dict[int, float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prescribed(Task):
    """A figure that the test prescribes for each evaluation; not a number: the run dies."""

    name: ClassVar[str] = "prescribed"
    live: ClassVar[bool] = True

    def wants(self) -> tuple[Want, ...]:
        return ()

    def figures(self) -> dict[str, FigureInfo]:
        info = FigureInfo(title="Prescribed", caption="As the test says.", best="lowest")
        return {"error": info, "never": info}

    def measure(self, inputs: Inputs) -> Outcome:
        step, value = VALUES.popitem()
        if math.isnan(value):
            raise RuntimeError(f"killed at step {step}")
        return Outcome(figures={"error": Measured(value=value)})


def prescribe(values: dict[int, float]) -> None:
    VALUES.clear()
    VALUES.update(reversed(values.items()))


def configuration(packed_demo: Any, out: Path, keep_best: str | None = "prescribed/error") -> Config:
    base = PRESETS["demo"][1]
    data = dataclasses.replace(base.data, shards=str(packed_demo.train), batch_size=16, backend="dali", num_threads=1)
    return dataclasses.replace(
        base,
        data=data,
        views=dataclasses.replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=dataclasses.replace(base.method, queue_size=64),
        optim=OptimConfig(schedule="constant"),
        run=dataclasses.replace(base.run, device="cpu", precision="fp32", steps=6, out=str(out)),
        checkpoint=CheckpointConfig(every_steps=100, keep=1, keep_best=keep_best),
        eval=EvalConfig(tasks=("prescribed",) if keep_best else (), every_steps=1),
        log=dataclasses.replace(base.log, every_steps=1, trackers=()),
    )


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_keeps_its_best_checkpoint_over_a_failure(
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerator: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TASKS, "prescribed", f"{__name__}:Prescribed")
    run, plain = tmp_path / "run", tmp_path / "plain"
    prescribe({0: 0.1, 1: 0.5, 2: 0.3, 3: 0.4, 4: math.nan})
    with pytest.raises(RuntimeError, match="killed at step 4"):
        train(configuration(packed_demo, run))
    assert steps_of(run / "checkpoints") == [2]
    prescribe({3: 0.4, 4: 0.3, 5: 0.6, 6: 0.7})
    assert train(configuration(packed_demo, run)) == 0
    assert VALUES == {}
    assert (steps_of(run / "checkpoints"), checkpoint.best_step(run / "checkpoints")) == ([2, 6], 2)
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["best"] == {"figure": "prescribed/error", "value": 0.3, "step": 2}
    assert f"best prescribed/error: 0.3 at step 2, in {run}/checkpoints/best" in capsys.readouterr().err
    assert "checkpoints/best, by prescribed/error, is of step 2" in headline(read_run(run))
    best, of_step, newest = (
        open_encoder(str(run / name)).digest for name in ("checkpoints/best", "checkpoints/step-00000002", "")
    )
    assert best == of_step != newest
    assert train(configuration(packed_demo, plain, keep_best=None)) == 0
    assert losses(plain) == losses(run)


def test_a_figure_that_is_not_measured_is_refused(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    monkeypatch.setitem(TASKS, "prescribed", f"{__name__}:Prescribed")
    with pytest.raises(ValueError, match=r"--checkpoint\.keep-best knn/top1 is never measured: name held-out shards"):
        best_of("knn/top1", None)
    with pytest.raises(ValueError, match="knn/top1 is never measured: choose one of prescribed/error"):
        train(configuration(packed_demo, tmp_path / "run", keep_best="knn/top1"))
    assert not (tmp_path / "run").exists()
    prescribe({0: 0.1})
    with pytest.raises(ValueError, match="prescribed/never is not measured on these sets, only prescribed/error"):
        train(configuration(packed_demo, tmp_path / "run", keep_best="prescribed/never"))
