"""Command `moco-fast runs`."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from moco_fast.report.listing import ListedRun

__all__ = ["Runs"]

_LONGEST_PROBLEM = 100  # characters


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder: state, warnings, progress, best and last figure, time left, age, size on disk."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")] = "."
    """Folder to look in, at any depth."""
    sort: Literal["seen", "path", "state", "progress", "best", "size"] = "seen"
    """What comes first: what was last seen alive, the first name, what runs, what is furthest, best or largest."""
    json: bool = False
    """Print a list of JSON objects."""

    def execute(self) -> int:
        """Print the list; return the exit code."""
        from moco_fast.report.listing import list_runs

        runs = sorted(list_runs(Path(self.folder)), key=_orders()[self.sort])
        if self.json:
            print(json.dumps([asdict(run) | {"path": str(run.path)} for run in runs], indent=1))
        elif runs:
            print(_table(runs, Path(self.folder), now=time.time()))
        else:
            print(f"there is no run in {self.folder}", file=sys.stderr)
        return 0


def _orders() -> "dict[str, Callable[[ListedRun], Any]]":
    states = ["running", "killed", "failed", "stopped", "finished", None]

    def progress(run: "ListedRun") -> float:
        return (run.step or 0) / (run.num_steps or 1)

    # Of equal ones, the order of their names.
    return {
        "seen": lambda run: -(run.seen or 0),
        "path": lambda run: run.path,
        "state": lambda run: (states.index(run.state), -(run.seen or 0)),
        "progress": lambda run: -progress(run),
        # Figures of one kind side by side; a loss is no figure to choose by, and comes last.
        "best": lambda run: (run.best is None, run.figure or "", -_goodness(run)),
        "size": lambda run: -run.size_bytes,
    }


def _goodness(run: "ListedRun") -> float:
    best = run.best or 0.0
    return best if run.is_highest_best else -best


def _table(runs: "list[ListedRun]", folder: Path, *, now: float) -> str:
    from moco_fast.evaluation.result import aligned
    from shards.ground.units import format_bytes, format_duration

    lines = [["run", "state", "warnings", "step", "", "figure", "best", "last", "left", "seen", "size"]]
    for run in runs:
        of = "" if run.num_steps is None else f"of {run.num_steps:,} ({(run.step or 0) / run.num_steps:.0%})"
        best = "-" if run.best is None else f"{_value(run, run.best)} at {run.best_at:,}"
        lines.append(
            [
                str(run.path.relative_to(folder)) if run.path != folder else str(folder),
                run.state or "?",
                str(run.num_warnings or "-"),
                "-" if run.step is None else f"{run.step:,}",
                of,
                run.title or "-",
                best,
                "-" if run.last is None else _value(run, run.last),
                "-" if run.left_s is None else format_duration(run.left_s),
                "-" if run.seen is None else f"{format_duration(max(now - run.seen, 0))} ago",
                format_bytes(run.size_bytes),
            ]
        )
    problems = [f"{run.path}: {_short(problem)}" for run in runs for problem in run.problems]
    return "\n".join([aligned(lines), *(["", *problems] if problems else [])])


def _value(run: "ListedRun", value: float) -> str:
    return f"{100 * value:.1f}%" if run.is_percent else f"{value:.4g}"


def _short(problem: str) -> str:
    line = " ".join(problem.split())
    return line if len(line) <= _LONGEST_PROBLEM else f"{line[: _LONGEST_PROBLEM - 3]}..."
