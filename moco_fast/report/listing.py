"""List of the runs below a folder: state, progress, metrics, age and size. Does not import torch.

Thousands of runs are listed from their files' ends and from the lines that hold a figure; what is wrong with a folder
is said in its row.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moco_fast.config import Config, from_dict
from moco_fast.evaluation.base import Score
from moco_fast.evaluation.registry import find_scores
from moco_fast.training.schedule import run_length
from moco_fast.training.state import RunState, last_seen, read_outcome, read_warnings, run_state

__all__ = ["ListedRun", "list_runs"]

_SIGNS = ("outcome.json", "metrics.jsonl", "environment.json", "checkpoints", "lock")
_END_BYTES = 1 << 16  # of metrics.jsonl: more than a hundred lines
_MATTERS = "config.json"


@dataclass(kw_only=True)
class ListedRun:
    """A run below the folder; None: not known."""

    path: Path
    state: RunState | None = None
    step: int | None = None
    num_steps: int | None = None
    figure: str | None = None
    """Name in metrics.jsonl of the figure below: of the run's first evaluation, or the loss where it has none."""
    title: str | None = None
    """What the figure is called."""
    is_percent: bool = False
    is_highest_best: bool = True
    last: float | None = None
    best: float | None = None
    best_at: int | None = None
    """Step of the best value."""
    left_s: float | None = None
    """Seconds of training that are left, at the pace of the last lines; of running runs."""
    seen: float | None = None
    """When it was last seen alive, in seconds since the epoch."""
    num_warnings: int = 0
    """What it was warned of while it trained (warnings.jsonl)."""
    size_bytes: int = 0
    """On disk."""
    problems: list[str] = field(default_factory=list[str])


def list_runs(folder: Path) -> list[ListedRun]:
    """Return the runs below a folder, itself included; links to folders are not followed.

    A folder is that of a run if it has a run's files; what cannot be read is a row with its problem.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name one with runs in it")
    return [_listed(each) for each in _find(folder)]


@dataclass(frozen=True)
class _RunPlace:
    path: Path
    problem: str = ""


def _find(folder: Path) -> Iterator[_RunPlace]:
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError as error:
        yield _RunPlace(folder, f"cannot be read: {error.strerror}")
        return
    signs = sum(name in names for name in _SIGNS)
    # Other tools have a config.json too, and a folder called checkpoints alone says nothing.
    if signs >= (1 if _MATTERS in names else 2):
        yield _RunPlace(folder)
        return
    for name in sorted(name for name, is_folder in names.items() if is_folder):
        yield from _find(folder / name)


def _listed(found: _RunPlace) -> ListedRun:
    run = ListedRun(path=found.path)
    if found.problem:
        run.problems.append(found.problem)
        return run
    for fill in (_fill_state, _fill_progress, _fill_size):
        try:
            fill(run)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            run.problems.append(_described(error))
    return run


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def _fill_state(run: ListedRun) -> None:
    run.seen = last_seen(run.path)
    run.state = run_state(run.path)
    if (run.path / "outcome.json").is_file():
        _read(run.path / "outcome.json")
    outcome = read_outcome(run.path)
    run.step, run.num_steps = outcome.get("step"), outcome.get("num_steps")
    run.num_warnings = len(read_warnings(run.path))


def _fill_progress(run: ListedRun) -> None:
    lines, whole = _last_lines(run.path / "metrics.jsonl")
    if lines:
        run.step = max(lines[-1]["step"], run.step or 0)
    training = [line for line in lines if "loss" in line]
    score = None
    try:
        config = from_dict(_read(run.path / _MATTERS))
        environment = _read(run.path / "environment.json") if (run.path / "environment.json").is_file() else {}
        run.num_steps = run.num_steps or _num_steps(config, environment)
        score = next((score for score in find_scores(config) if score.is_headline), None)
    except (ValueError, OSError, KeyError, TypeError) as error:
        run.problems.append(_described(error))
    if score is not None and (curve := _curve(whole, score.figure)):
        _fill_figure(run, score, curve)
    elif training:
        run.figure = run.title = "loss"
        run.last = training[-1]["loss"]
    if run.state == "running" and run.num_steps is not None and len(training) > 1:
        first, last = training[0], training[-1]
        pace_s = (last["time_s"] - first["time_s"]) / max(last["step"] - first["step"], 1)
        run.left_s = max(run.num_steps - last["step"], 0) * pace_s


def _fill_figure(run: ListedRun, score: Score, curve: list[tuple[int, float]]) -> None:
    choose = max if score.best == "highest" else min
    run.figure, run.title, run.is_percent = score.figure, score.name, score.percent
    run.is_highest_best = score.best == "highest"
    run.last = curve[-1][1]
    # Of equal ones the first.
    run.best_at, run.best = choose(curve, key=lambda point: point[1])


def _num_steps(config: Config, environment: dict[str, Any]) -> int | None:
    if "num_steps" in environment:
        return environment["num_steps"]
    per_epoch = environment.get("steps_per_epoch")
    if per_epoch is None and config.run.steps is None and config.run.samples is None:
        return None
    return run_length(config, batches_per_epoch=per_epoch or 1)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing: the run was refused or ended before it began") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is damaged: it holds no object")
    return found


def _last_lines(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return the last lines of metrics, as far as they are whole, and the whole text."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return [], b""
    # A first line that is cut, a last one that is being written.
    return [line for part in text[-_END_BYTES:].splitlines() if (line := _line(part)) is not None], text


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _curve(text: bytes, figure: str) -> list[tuple[int, float]]:
    """Return (step, value) of a figure; of all lines only those that have it are parsed."""
    name = json.dumps(figure).encode()
    found: list[tuple[int, float]] = []
    for match in re.finditer(re.escape(name), text):
        begin = text.rfind(b"\n", 0, match.start()) + 1
        end = text.find(b"\n", match.start())
        line = _line(text[begin : len(text) if end < 0 else end])
        if line is not None and isinstance(line.get(figure), int | float):
            found.append((line["step"], line[figure]))
    return found


def _fill_size(run: ListedRun) -> None:
    run.size_bytes = _size(run.path)


def _size(folder: str | Path) -> int:
    """Return what the files below a folder take on disk."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _size(entry.path)
            else:
                total += 512 * entry.stat(follow_symlinks=False).st_blocks
    return total
