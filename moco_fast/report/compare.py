"""Page that compares runs: curves over steps, samples, time and cost, settings, machines, and figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from moco_fast import __version__
from moco_fast.config import Config, flatten, option_name, to_dict
from moco_fast.evaluation.base import Score
from moco_fast.evaluation.registry import find_scores
from moco_fast.methods.base import Chart
from moco_fast.report.differences import ABSENT, Cell, ComparedRow, environment_rows, figure_rows, setting_rows
from moco_fast.report.figures import NUM_STYLES, RunCurve, draw_runs, line_style
from moco_fast.report.gauged import SPEED_CHARTS
from moco_fast.report.hours import name_of_hours, rank_hours, rank_hours_at
from moco_fast.report.record import RunRecord, read_run
from moco_fast.report.report import charts_of, open_template
from moco_fast.report.words import headline
from shards.ground.files import write_whole
from shards.ground.units import format_duration

__all__ = ["write_comparison"]


_EVERY = 2  # h, min or s of the longest run from which on its time is written in that unit


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run with what the page says of it."""

    record: RunRecord
    number: int
    name: str
    letter: str
    color: int
    dashes: str
    """Of its curves, as an SVG's stroke-dasharray."""
    headline: str
    figures: dict[str, str]
    """Column of the table of figures -> text."""


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """What curves can be drawn over."""

    key: str
    name: str
    of: Callable[[RunRecord, dict[str, float]], float]
    """Where a line of metrics lies."""
    records: Sequence[RunRecord]

    @property
    def end(self) -> float:
        """Where the last run ends: all charts have the same axis."""
        return max((self.of(record, record.last) for record in self.records), default=0)


@dataclass(frozen=True, kw_only=True)
class _AxisCharts:
    """Chart over every axis."""

    title: str
    caption: str
    percent: bool
    by_axis: dict[str, Markup]


def write_comparison(runs: Sequence[str | Path], out: Path, *, price_per_hour: float | None = None) -> Path:
    """Write a page that compares runs, whatever their status, and needs nothing else.

    Args:
        runs: their folders; differences are from the first one.
        out: file to write.
        price_per_hour: of one GPU, or of one rank where there is none; None: the page counts hours.

    Returns:
        path of the page.

    Raises:
        ValueError: a folder does not belong to a run, is given twice, or there are too many.
        OSError: the page cannot be written.
    """
    _refuse_what_cannot_be_compared(runs)
    records = [read_run(run) for run in runs]
    names = _short_names([record.path for record in records])
    hours_name = name_of_hours([record for record in records if "world_size" in record.environment])
    axes = _axes(records, hours_name, price_per_hour)
    compared = [
        _compared(number, record, name, hours_name, price_per_hour)
        for number, (record, name) in enumerate(zip(records, names, strict=True))
    ]
    decide, others = setting_rows(records)
    machines, same = environment_rows(records)
    scores = [_single(find_scores(record.config)) for record in records]
    watched = [_single(charts_of(record.config)) for record in records]
    page = open_template("compare.html").render(
        runs=compared,
        outcomes=_outcome_rows(compared),
        lead=_lead(compared),
        axes=axes,
        learning=[*_drawn(axes, scores, "learning", points=True), *_drawn(axes, watched, "learning")],
        health=[*_drawn(axes, scores, "health", points=True), *_drawn(axes, watched, "health")],
        speed=_drawn(axes, [_single(SPEED_CHARTS)] * len(records), "learning"),
        figures=figure_rows(records),
        decide=decide,
        others=others,
        machines=machines,
        same=same,
        price_per_hour=price_per_hour,
        hours_name=hours_name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    write_whole(out, page, durable=False)
    return out


def _refuse_what_cannot_be_compared(runs: Sequence[str | Path]) -> None:
    if len(runs) > NUM_STYLES:
        raise ValueError(f"{len(runs)} runs are too many for one page, which can tell {NUM_STYLES} apart: name fewer")
    places = [Path(run).resolve() for run in runs]
    for place, run in zip(places, runs, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{run} is named twice: a run compared with itself has no difference")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return as much of the ends of paths as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths are different")


def _axes(records: Sequence[RunRecord], hours_name: str, price_per_hour: float | None) -> list[_Axis]:
    longest_s = max(record.last["time_s"] for record in records)
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit, length_s = next((each for each in units.items() if longest_s >= _EVERY * each[1]), ("seconds", 1))
    steps = _Axis(key="steps", name="steps", of=lambda _, line: line["step"], records=records)
    samples = _Axis(key="samples", name="samples", of=lambda _, line: line["samples"], records=records)
    time = _Axis(key="time", name=unit, of=lambda _, line: line["time_s"] / length_s, records=records)
    # A run that does not say how many ranks it had has no cost that could be drawn.
    costed = [record for record in records if "world_size" in record.environment]
    price = 1.0 if price_per_hour is None else price_per_hour
    cost = _Axis(
        key="cost",
        name=hours_name if price_per_hour is None else "cost",
        of=lambda record, line: price * rank_hours_at(record, line["time_s"]),
        records=costed,
    )
    return [steps, samples, time, cost] if costed else [steps, samples, time]


def _compared(number: int, record: RunRecord, name: str, hours_name: str, price_per_hour: float | None) -> ComparedRun:
    letter, color, dashes = line_style(number)
    return ComparedRun(
        record=record,
        number=number,
        name=name,
        letter=letter,
        color=color,
        dashes=" ".join(f"{each:g}" for each in dashes),
        headline=headline(record),
        figures=_score_figures(record) | _spent_figures(record, hours_name, price_per_hour),
    )


def _outcome_rows(runs: Sequence[ComparedRun]) -> list[ComparedRow]:
    names = dict.fromkeys(chain.from_iterable(run.figures for run in runs))
    return [
        ComparedRow(name=name, cells=tuple(Cell(text=run.figures.get(name, ABSENT)) for run in runs)) for name in names
    ]


def _score_figures(record: RunRecord) -> dict[str, str]:
    """Return the final and the best values of a run's evaluations, and its final loss."""
    found: dict[str, str] = {}
    for score in find_scores(record.config):
        curve = record.curve(score.figure)
        if score.is_headline and curve:
            best_step, best = _best(score, curve)
            found[score.name] = _value(score, curve[-1][1])
            found[f"best {score.name}"] = f"{_value(score, best)} at step {best_step:,.0f}"
    if record.training:
        found["loss"] = f"{record.training[-1]['loss']:.3f}"
    return found


def _best(score: Score, curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    choose = max if score.best == "highest" else min
    return choose(curve, key=lambda point: point[1])


def _value(score: Score, value: float) -> str:
    return f"{100 * value:.1f}%" if score.percent else f"{value:.4g}"


def _spent_figures(record: RunRecord, hours_name: str, price_per_hour: float | None) -> dict[str, str]:
    last = record.last
    found = {
        "steps": f"{last['step']:,.0f}",
        "epochs": f"{last['epoch']:.3g}",
        "samples": f"{last['samples']:,.0f}",
        "training time": format_duration(last["time_s"]),
    }
    # The first line includes the warm-up.
    lines = record.training[1:] or record.training
    if steady := [line["samples_per_s"] for line in lines if "samples_per_s" in line]:
        found["samples/s"] = f"{median(steady):,.0f}"
    hours = rank_hours(record)
    if hours is not None:
        found[hours_name] = f"{hours.total:,.3g}"
        if price_per_hour is not None:
            found["cost"] = f"{price_per_hour * hours.total:,.2f}"
    return found


def _lead(runs: Sequence[ComparedRun]) -> str:
    """Say which run is ahead, where all were measured in the same way."""
    ways = [_way_of_evaluation(run.record.config) for run in runs]
    if differ := [f"--{option_name(name)}" for name in ways[0] if any(way[name] != ways[0][name] for way in ways)]:
        return f"They were not evaluated in the same way while they trained ({', '.join(differ)})."
    for score in find_scores(runs[0].record.config):
        ends = {run.letter: (run, curve[-1][1]) for run in runs if (curve := run.record.curve(score.figure))}
        if score.is_headline and len(ends) == len(runs):
            order = sorted(ends.values(), key=lambda end: end[1], reverse=score.best == "highest")
            (first, value), (second, other) = order[:2]
            return (
                f"{first.name} ends with the {score.best} {score.name}: {_value(score, value)}, ahead of {second.name} "
                f"with {_value(score, other)}."
            )
    return ""


def _way_of_evaluation(config: Config) -> dict[str, Any]:
    """Return the options that decide what the figures of evaluations are."""
    names = ("eval.every_steps", "eval.online_probe", "eval.probe_lr")
    found = {name: value for name, value in flatten(to_dict(config)).items() if name.startswith("eval.")}
    return {name: value for name, value in found.items() if name not in names} | {"views.size": config.views.size}


def _single(charts: Iterable[Chart]) -> dict[str, Chart]:
    """Return a chart for each value that runs log, by its name in metrics.jsonl: several runs fill a chart with it."""
    return {
        name: replace(chart, title=f"{chart.title}: {label}" if label else chart.title, curves={name: ""})
        for chart in charts
        for name, label in chart.curves.items()
    }


def _drawn(
    axes: Sequence[_Axis], charts: Sequence[Mapping[str, Chart]], about: str, *, points: bool = False
) -> list[_AxisCharts]:
    """Draw each value of a section that some run has, over every axis.

    Args:
        axes: what to draw over.
        charts: of each run, by the value's name.
        about: the section.
        points: mark each value.
    """
    found: list[_AxisCharts] = []
    for name in dict.fromkeys(chain.from_iterable(charts)):
        known = [of_run[name] for of_run in charts if name in of_run]
        if known[0].about != about:
            continue
        chart = replace(known[0], level=known[0].level if len({each.level for each in known}) == 1 else None)
        drawn = {axis.key: svg for axis in axes if (svg := _draw(name, chart, axis, axes[0].records, points=points))}
        if drawn:
            found.append(_AxisCharts(title=chart.title, caption=chart.caption, percent=chart.percent, by_axis=drawn))
    return found


def _draw(name: str, chart: Chart, axis: _Axis, records: Sequence[RunRecord], *, points: bool) -> Markup | None:
    curves: list[RunCurve] = []
    for number, record in enumerate(records):
        lines = [line for line in (*record.training, *record.evaluations) if name in line]
        if lines and any(record is each for each in axis.records):
            x, values = [axis.of(record, line) for line in lines], [line[name] for line in lines]
            curves.append(RunCurve(run=number, x=x, values=values))
    if not curves:
        return None
    svg = draw_runs(
        curves,
        alt=f"{chart.title} over {axis.name}",
        x_max=axis.end,
        level=chart.level,
        points=points,
        percent=chart.percent,
        from_zero=chart.from_zero,
    )
    return Markup(svg)  # noqa: S704 - figures.py and matplotlib escape text
