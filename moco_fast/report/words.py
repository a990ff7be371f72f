"""Texts and tables of the report."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from moco_fast.checkpoint import best_step
from moco_fast.config import Config, flatten, option_name, to_dict
from moco_fast.evaluation.base import Score
from moco_fast.evaluation.registry import find_scores
from moco_fast.methods.base import Level
from moco_fast.presets import PRESETS
from moco_fast.report.record import RunRecord
from moco_fast.training.state import Beat
from shards.ground.units import format_duration

__all__ = ["Option", "Tile", "configuration_table", "environment_table", "headline", "tiles", "written_option"]

_LONG_S = 600.0  # without a step


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Figure in the report's summary."""

    name: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """Row of the configuration table."""

    name: str
    value: str
    recipe: str | None
    """The recipe's value, if the run's differs."""


def headline(record: RunRecord) -> str:
    """Describe the run's status in a sentence."""
    last = record.last
    done = (
        f"{last['step']:,.0f} steps ({last['epoch']:.3g} epochs, {last['samples']:,.0f} samples) in "
        f"{format_duration(last['time_s'])}"
    )
    best = best_step(record.path / "checkpoints")
    if best is not None:
        done += f"; checkpoints/best, by {record.config.checkpoint.keep_best}, is of step {best:,}"
    if record.status == "finished":
        return f"Finished: {done}."
    if record.status == "running":
        return f"Running: {done} so far{_sign_of_life(record.beat)}."
    if record.checkpoint is None:
        then = "no checkpoint is there, so the same command begins again"
    else:
        then = f"the same command continues from step {record.checkpoint:,}"
    if record.status == "stopped":
        return f"Stopped and saved after {done}; {then}."
    if record.status == "failed":
        why = record.outcome.get("error", "no reason was recorded")
        return f"Failed after {done}: {why}; {then}."
    return f"Ended without a word, as after a kill or on a full disk, after {done}; {then}."


def _sign_of_life(beat: Beat | None) -> str:
    if beat is None:
        return ""
    idle_s = time.time() - beat.step_time
    idle = f", where the newest step ended {format_duration(idle_s)} ago" if idle_s > _LONG_S else ""
    return f", process {beat.pid} on {beat.host}{idle}"


def tiles(record: RunRecord) -> list[Tile]:
    """Summarize the run in a few figures; those that are not yet known are left out."""
    found: list[Tile] = []
    found += [
        _score_tile(score, curve, start=record.start)
        for score in find_scores(record.config)
        if score.is_headline and (curve := record.curve(score.figure))
    ]
    if record.training:
        last = record.training[-1]
        found.append(
            Tile(
                name="Loss",
                value=f"{last['loss']:.2f}",
                note=record.config.method.note(last),
            )
        )
        # The first line includes the warm-up.
        steady = record.training[1:] or record.training
        waiting = sum(line["data_wait_share"] for line in steady) / len(steady)
        found.append(
            Tile(
                name="Samples per second",
                value=f"{median(line['samples_per_s'] for line in steady):,.0f}",
                note=f"{100 * waiting:.1f}% of the time waiting for data",
            )
        )
    num_samples = record.environment.get("num_samples")
    if num_samples is not None:
        found.append(
            Tile(
                name="Samples",
                value=f"{num_samples:,}",
                note=f"batches of {record.config.data.batch_size:,}, views of {record.config.views.size} pixels",
            )
        )
    return found


def _score_tile(score: Score, curve: list[tuple[float, float]], *, start: str) -> Tile:
    """Compare the newest value with the untrained encoder's or the score's own level, and with the best one."""

    def written(value: float) -> str:
        return f"{100 * value:.1f}%" if score.percent else f"{value:.4g}"

    (first_step, first), (last_step, last) = curve[0], curve[-1]
    level = score.level
    if level is None and first_step == 0 and len(curve) > 1:
        level = Level(value=first, label=start)
    note = f"at step {last_step:,.0f}"
    if level is not None:
        gain = f"{100 * (last - level.value):+.1f} points" if score.percent else f"{last - level.value:+.4g}"
        note = f"{level.label} {written(level.value)}, {gain}"
    choose = max if score.best == "highest" else min
    best_step, best = choose(reversed(curve), key=lambda point: point[1])
    if best != last:
        note += f"; best {written(best)} at step {best_step:,.0f}"
    return Tile(name=score.name, value=written(last), note=note)


def configuration_table(record: RunRecord) -> list[Option]:
    """List every option with its value, and the recipe's value where it differs."""
    recipe = _options(PRESETS[record.recipe][1])
    return [
        Option(
            name=name,
            value=written_option(value),
            recipe=None if recipe.get(name) == value else written_option(recipe.get(name)),
        )
        for name, value in _options(record.config).items()
    ]


def environment_table(record: RunRecord) -> list[tuple[str, str]]:
    """List the run's software and hardware."""
    names = {
        "device": "Device",
        "num_cpus": "CPUs",
        "num_threads": "Threads",
        "world_size": "Ranks",
        "precision": "Precision",
        "compile": "Compiled",
        "loader": "Loader",
        "steps_per_epoch": "Steps per epoch",
        "moco_fast": "moco-fast",
        "torch": "torch",
        "cuda": "CUDA",
        "python": "Python",
        "branch": "Branch of",
    }
    found = [(title, record.environment.get(name)) for name, title in names.items()]
    return [(title, written_option(value)) for title, value in found if value is not None]


def _options(config: Config) -> dict[str, Any]:
    return {f"--{option_name(name)}": value for name, value in flatten(to_dict(config)).items() if "." in name}


def written_option(value: Any) -> str:
    """Write an option's value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(written_option(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    # A recipe has no value for an option that the user must give.
    return str(value) if isinstance(value, int | str) else "unset"
