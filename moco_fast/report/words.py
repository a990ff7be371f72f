"""What the report says in words and tables."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from moco_fast.config import Config, flatten, option_name, to_dict
from moco_fast.presets import PRESETS
from moco_fast.report.record import RunRecord
from shards.ground.units import format_duration

__all__ = ["Option", "Tile", "configuration_table", "environment_table", "headline", "tiles"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure that matters."""

    name: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """One row of the configuration."""

    name: str
    value: str
    recipe: str | None
    """The recipe's value, if the run has another."""


def headline(record: RunRecord) -> str:
    """How far the run is, in a sentence."""
    last = record.last
    done = (
        f"{last['step']:,.0f} steps ({last['epoch']:.3g} epochs, {last['samples']:,.0f} samples) in "
        f"{format_duration(last['time_s'])}"
    )
    if record.status == "finished":
        return f"Finished: {done}."
    if record.status == "stopped":
        return f"Stopped and saved after {done}; the same command continues."
    if record.status == "failed":
        return f"Failed after {done}: {record.outcome.get('error', 'no reason was written down')}"
    return f"Under way: {done} so far."


def tiles(record: RunRecord) -> list[Tile]:
    """Summarize the run in a few figures; what is not known yet is left out."""
    found: list[Tile] = []
    if record.evaluations:
        first, last = record.evaluations[0], record.evaluations[-1]
        gain = 100 * (last["knn/top1"] - first["knn/top1"])
        compared = f"untrained {100 * first['knn/top1']:.1f}%, {gain:+.1f} points"
        note = compared if first["step"] == 0 and len(record.evaluations) > 1 else f"at step {last['step']:,.0f}"
        found.append(Tile(name="kNN top-1", value=f"{100 * last['knn/top1']:.1f}%", note=note))
    if record.training:
        last = record.training[-1]
        found.append(
            Tile(
                name="Loss",
                value=f"{last['loss']:.2f}",
                note=record.config.method.note(last),
            )
        )
        # The first line includes warming up.
        steady = record.training[1:] or record.training
        waiting = sum(line["data_wait_share"] for line in steady) / len(steady)
        found.append(
            Tile(
                name="Samples a second",
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


def configuration_table(record: RunRecord) -> list[Option]:
    """List every option with its value, and the recipe's where the run has another."""
    recipe = _options(PRESETS[record.recipe][1])
    return [
        Option(
            name=name, value=_written(value), recipe=None if recipe.get(name) == value else _written(recipe.get(name))
        )
        for name, value in _options(record.config).items()
    ]


def environment_table(record: RunRecord) -> list[tuple[str, str]]:
    """List what the run took place on."""
    names = {
        "device": "Device",
        "num_cpus": "CPUs",
        "num_threads": "Threads",
        "world_size": "Ranks",
        "precision": "Precision",
        "compile": "Compiled",
        "loader": "Loader",
        "steps_per_epoch": "Steps an epoch",
        "moco_fast": "moco-fast",
        "torch": "torch",
        "cuda": "CUDA",
        "python": "Python",
    }
    found = [(title, record.environment.get(name)) for name, title in names.items()]
    return [(title, _written(value)) for title, value in found if value is not None]


def _options(config: Config) -> dict[str, Any]:
    return {f"--{option_name(name)}": value for name, value in flatten(to_dict(config)).items()}


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(_written(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    # A recipe has no value of its own where the user must give one.
    return str(value) if isinstance(value, int | str) else "unset"
