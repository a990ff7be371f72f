"""Record of a run, read from its folder: configuration, environment, metrics, status. The run may still be running."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moco_fast.config import Config, differences
from moco_fast.evaluation.result import Result, read_results
from moco_fast.presets import PRESETS
from moco_fast.recovery import candidates, seems_whole
from moco_fast.training.state import (
    Beat,
    RunState,
    last_seen,
    read_beat,
    read_config,
    read_json,
    read_lines,
    read_outcome,
    read_warnings,
    run_state,
)

__all__ = ["RunRecord", "read_run"]

_WHERE = ("step", "epoch", "samples", "time_s")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Contents of a run's folder."""

    path: Path
    config: Config
    environment: dict[str, Any]
    status: RunState
    outcome: dict[str, Any]
    training: list[dict[str, float]]
    """Lines of metrics with a loss, ordered by step."""
    evaluations: list[dict[str, float]]
    """Lines of metrics with figures of an evaluation, ordered by step."""
    beat: Beat | None
    """Its last sign of life."""
    checkpoint: int | None
    """Step of its newest checkpoint; None: there is none to continue from."""
    results: list[Result]
    """Results that `moco-fast eval` wrote into the folder, newest last."""
    starts: list[dict[str, Any]]
    """Every start of the run, the first one first: the step that it began with, when, on what (starts.jsonl)."""
    warnings: list[dict[str, Any]]
    """What the run was warned of, and after which step (warnings.jsonl)."""
    changed: list[dict[str, Any]]
    """What was other than before when the run was continued (changes.jsonl)."""
    seen: float | None
    """When the run last showed that it was alive, in seconds since the epoch."""

    @property
    def recipe(self) -> str:
        """Preset that the run was started with, or the one nearest to its settings."""
        if self.config.recipe in PRESETS:
            return self.config.recipe
        program, words = _of_program(self.environment.get("command", []))
        named = words[0].replace("_", "-") if words and program[-1] in ("moco_fast.train", "train") else None
        return named if named in PRESETS else min(PRESETS, key=lambda name: len(self.changes(name)))

    @property
    def command(self) -> str:
        """Command that started the run, the launcher's if there was one, without the interpreter; empty if unknown."""
        launcher: list[str] = self.environment.get("launch", {}).get("command") or []
        if "launch" in launcher:
            return shlex.join(["accelerate", *launcher[launcher.index("launch") :]])
        if "accelerate.commands.launch" in launcher:
            return shlex.join(["accelerate", "launch", *launcher[launcher.index("accelerate.commands.launch") + 1 :]])
        program, words = _of_program(self.environment.get("command", []))
        return shlex.join([*program, *words])

    @property
    def start(self) -> str:
        """What the encoder was before the first step, in a word."""
        return "untrained" if self.config.run.init_from is None else "at the start"

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return the (step, value) pairs of a name in metrics.jsonl, ordered by step."""
        return [(line["step"], line[name]) for line in (*self.training, *self.evaluations) if name in line]

    @property
    def last(self) -> dict[str, float]:
        """The newest line of metrics of either kind; a line for step 0 if there is none."""
        nothing = {"step": 0, "epoch": 0.0, "samples": 0, "time_s": 0.0}
        return max([nothing, *self.evaluations, *self.training], key=lambda line: line["step"])

    def changes(self, recipe: str) -> list[str]:
        """List the options that differ from a preset's, as `--option: preset's -> run's`, without paths."""
        paths = ("--data.shards", "--eval.shards", "--run.out")
        return [line for line in differences(PRESETS[recipe][1], self.config) if not line.startswith(paths)]


def read_run(path: str | Path) -> RunRecord:
    """Read a run's folder, whatever the run's status.

    Raises:
        ValueError: the folder does not belong to a run, or its configuration cannot be read.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json, so it is not a run's folder: give the --run.out of a training run"
        )
    lines = sorted(read_lines(path / "metrics.jsonl", needs=_WHERE), key=lambda line: line["step"])
    return RunRecord(
        path=path,
        config=read_config(path / "config.json"),
        environment=read_json(path / "environment.json") | {"branch": read_json(path / "branch.json").get("reference")},
        status=run_state(path),
        outcome=read_outcome(path),
        beat=read_beat(path),
        checkpoint=_newest_checkpoint(path),
        training=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "loss" not in line],
        results=_read_results(path / "evaluations"),
        starts=read_lines(path / "starts.jsonl"),
        warnings=read_warnings(path),
        changed=read_lines(path / "changes.jsonl"),
        seen=last_seen(path),
    )


def _of_program(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a process's command line into how training is called, without the interpreter, and its words."""
    # The first match counts: a later word may be an option's value.
    for place, (word, following) in enumerate(pairwise(words)):
        if word == "-m":
            return ["python", "-m", following], list(words[place + 2 :])
        if Path(word).name == "moco-fast" and following == "train":
            return ["moco-fast", "train"], list(words[place + 2 :])
    return [], []


def _read_results(folder: Path) -> list[Result]:
    """Read every results file; files that another version wrote or that hold no results are ignored."""
    results: list[Result] = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(ValueError):
            results += read_results(path)
    return results


def _newest_checkpoint(path: Path) -> int | None:
    whole = [each for each in candidates(path / "checkpoints") if seems_whole(each)]
    return int(whole[-1].name.removeprefix("step-")) if whole else None
