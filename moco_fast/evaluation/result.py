"""Results: figures of a task with intervals, and everything that is needed to repeat them; as JSON, as a table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, Self

from moco_fast.evaluation.base import FigureCurve, FigureInfo, Measured, Outcome, Task
from shards.ground.files import write_whole

__all__ = [
    "Figure",
    "Result",
    "aligned",
    "as_json",
    "as_text",
    "average_curves",
    "read_results",
    "summarize",
    "table",
    "wilson_interval",
    "with_interval",
    "write_results",
]

FORMAT = "moco-fast-results"
_VERSION = 1
_Z = 1.959964  # of 95% of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure with what is known of its uncertainty."""

    value: float
    """Mean over the seeds."""
    interval: tuple[float, float] | None = None
    """95% confidence interval."""
    interval_of: str = ""
    """What the interval is over: seeds, or samples."""
    by_seed: tuple[float, ...] = ()
    """One value for each seed."""
    title: str = ""
    caption: str = ""
    unit: Literal["share", "number"] = "share"
    best: Literal["highest", "lowest"] = "highest"

    def __str__(self) -> str:
        return _written(self.value, self.unit)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a task measured of an encoder."""

    task: str
    protocol: str
    """Of those that the task knows; empty where it knows one."""
    settings: dict[str, Any]
    """Every option of the task, as it was used."""
    encoder: dict[str, str]
    """`name` and `digest`."""
    step: int | None = None
    """Optimizer steps after which a run had this encoder."""
    data: dict[str, dict[str, Any]]
    """Of each set: where, digest, num_samples, num_classes."""
    view: dict[str, Any]
    """How images were seen: size, crop, backend."""
    precision: str
    device: str
    world_size: int
    seeds: tuple[int, ...]
    figures: dict[str, Figure]
    """The most important one first."""
    curves: dict[str, FigureCurve] = field(default_factory=dict[str, FigureCurve])
    """Means over the seeds."""
    chosen: tuple[dict[str, Any], ...] = ()
    """Hyperparameters that were chosen, for each seed."""
    facts: dict[str, int] = field(default_factory=dict[str, int])
    """Counts that say what the figures rest on."""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict[str, str])
    time_s: float = 0.0
    """Seconds that it took, once the features were there."""

    @property
    def headline(self) -> Figure:
        """The most important figure."""
        return next(iter(self.figures.values()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed JSON. Raises KeyError or TypeError: a field is missing or unknown."""
        rest = dict(values)
        rest["figures"] = {name: _figure(figure) for name, figure in values["figures"].items()}
        rest["curves"] = {name: _curve(curve) for name, curve in values.get("curves", {}).items()}
        for name in ("seeds", "chosen", "notes"):
            rest[name] = tuple(values[name])
        return cls(**rest)


def _figure(values: Mapping[str, Any]) -> Figure:
    rest: dict[str, Any] = dict(values)
    rest["interval"] = None if values["interval"] is None else tuple(values["interval"])
    rest["by_seed"] = tuple(values["by_seed"])
    return Figure(**rest)


def _curve(values: Mapping[str, Any]) -> FigureCurve:
    rest: dict[str, Any] = dict(values)
    rest["points"] = tuple((float(x), float(y)) for x, y in values["points"])
    return FigureCurve(**rest)


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share of independent trials (Wilson 1927)."""
    z2 = _Z**2 / num_trials
    center = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / num_trials + z2 / num_trials / 4)
    # Rounding takes the bounds of a share of 0 or 1 beyond it, which would be printed as -0.00%.
    return max(0.0, center - half), min(1.0, center + half)


def summarize(infos: Mapping[str, FigureInfo], outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Bring together what was measured with each seed, in the order in which the task names its figures."""
    names = [name for name in infos if name in outcomes[0].figures]
    assert len(names) == len(outcomes[0].figures), "a task measured a figure that it does not name"
    return {name: _over_seeds(infos[name], [outcome.figures[name] for outcome in outcomes]) for name in names}


def average_curves(outcomes: Sequence[Outcome]) -> dict[str, FigureCurve]:
    """Bring together the curves that were measured with each seed."""
    first, *_ = outcomes
    return {
        name: replace(
            curve,
            points=tuple(
                (x, fmean(outcome.curves[name].points[number][1] for outcome in outcomes))
                for number, (x, _) in enumerate(curve.points)
            ),
        )
        for name, curve in first.curves.items()
    }


def _over_seeds(info: FigureInfo, measured: Sequence[Measured]) -> Figure:
    values = [each.value for each in measured]
    figure = Figure(value=fmean(values), by_seed=tuple(values), **asdict(info))
    if len(values) > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        interval, over = (figure.value - half, figure.value + half), f"{len(values)} seeds (Student's t)"
        return replace(figure, interval=interval, interval_of=over)
    [only] = measured
    if only.interval is not None:
        return replace(figure, interval=only.interval, interval_of="what the task draws")
    if only.num_trials:
        interval = wilson_interval(only.value, only.num_trials)
        return replace(figure, interval=interval, interval_of=f"{only.num_trials:,} test samples (Wilson)")
    return figure


def settings_of(task: Task) -> dict[str, Any]:
    """Return the options of a task as JSON can hold them."""
    return asdict(task)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a file of results, whole or not at all. Raises OSError."""
    write_whole(path, as_json(results), durable=False)


def as_json(results: Sequence[Result]) -> str:
    """Return results as the text of a file."""
    return (
        json.dumps({"format": FORMAT, "version": _VERSION, "results": [asdict(each) for each in results]}, indent=1)
        + "\n"
    )


def read_results(path: str | Path) -> list[Result]:
    """Read a file of results.

    Raises:
        ValueError: it is no such file, or of another version.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise KeyError("format")
        if values["version"] != _VERSION:
            raise ValueError(f"{path} has version {values['version']}, this code reads {_VERSION}: evaluate again")
        return [Result.from_dict(each) for each in values["results"]]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a file that `moco-fast eval ... --out` wrote") from None
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of results ({error!r}): give one that `moco-fast eval` wrote") from None


def table(results: Sequence[Result]) -> list[list[str]]:
    """Return lines of cells: a heading, then a line for each figure, with a column for each encoder.

    Of results of the same task, protocol and encoder the last one counts.
    """
    encoders = list(dict.fromkeys(result.encoder["name"] for result in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        task = f"{result.task} {result.protocol}".rstrip()
        for figure in result.figures.values():
            rows.setdefault((task, figure.title), {})[result.encoder["name"]] = with_interval(figure)
    lines = [["task", "figure", *encoders]]
    return lines + [[*key, *(cells.get(encoder, "-") for encoder in encoders)] for key, cells in rows.items()]


def as_text(results: Sequence[Result]) -> str:
    """Return the table as text for a terminal: what an encoder is stands above it, its column has the short name."""
    heading, *lines = table(results)
    encoders = heading[2:]
    short = [encoder.partition(" (")[0] for encoder in encoders]
    if len(set(short)) < len(short):
        return aligned([heading, *lines])
    described = [name.replace(" (", ": ", 1).removesuffix(")") for name in encoders if " (" in name]
    return "\n".join([*described, aligned([[*heading[:2], *short], *lines])])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text, columns side by side."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(text)


def with_interval(figure: Figure) -> str:
    """Return a figure as text, with its interval if it has one."""
    if figure.interval is None:
        return str(figure)
    low, high = (_written(bound, figure.unit) for bound in figure.interval)
    return f"{figure} ({low} to {high})"


def _written(value: float, unit: str) -> str:
    return f"{100 * value:.2f}%" if unit == "share" else f"{value:.4g}"
