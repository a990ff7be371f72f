"""Differences between runs: settings, machines, and figures of evaluations with intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moco_fast.config import flatten, may_change, option_name, to_dict
from moco_fast.evaluation.result import Figure, Result
from moco_fast.presets import PRESETS
from moco_fast.report.record import RunRecord
from moco_fast.report.words import written_option

__all__ = [
    "ABSENT",
    "Cell",
    "ComparedRow",
    "Difference",
    "difference",
    "environment_rows",
    "figure_rows",
    "setting_rows",
]

ABSENT = "-"
"""In place of what a run does not have."""
_MACHINE = {
    "device": "Device",
    "world_size": "Ranks",
    "hosts": "Hosts",
    "num_cpus": "CPUs",
    "num_threads": "Threads",
    "precision": "Precision",
    "compile": "Compiled",
    "loader": "Loader",
    "num_samples": "Samples",
    "moco_fast": "moco-fast",
    "torch": "torch",
    "cuda": "CUDA",
    "python": "Python",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a figure is from the first run's."""

    text: str
    """The difference, and its 95% interval if both figures have one."""
    verdict: str
    """`better`, `worse`, `within the interval`, or empty where nothing can be said."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run's value in a row."""

    text: str
    note: str = ""
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """What is compared, with a value for each run."""

    name: str
    group: str = ""
    cells: tuple[Cell, ...]


def setting_rows(records: Sequence[RunRecord]) -> tuple[list[ComparedRow], list[ComparedRow]]:
    """Return the options in which runs differ: those that decide what is learned, and those that do not.

    A value that is the recipe's own says so; the run's folder, which always differs, is left out.
    """
    flat = [flatten(to_dict(record.config)) for record in records]
    recipes = [flatten(to_dict(PRESETS[record.recipe][1])) for record in records]
    rules = [may_change(record.config) for record in records]
    decide: list[ComparedRow] = []
    others: list[ComparedRow] = []
    if len({record.recipe for record in records}) > 1:
        decide.append(ComparedRow(name="recipe", cells=tuple(Cell(text=record.recipe) for record in records)))
    for name in dict.fromkeys(name for values in flat for name in values):
        if name == "run.out" or _all_equal([values.get(name, ABSENT) for values in flat]):
            continue
        cells = tuple(
            Cell(text=ABSENT, note="not an option of this method")
            if name not in values
            else Cell(text=written_option(values[name]), note="default" if recipe.get(name) == values[name] else "")
            for values, recipe in zip(flat, recipes, strict=True)
        )
        # What a continued run may have otherwise has no say in what is learned; but other shards may be other samples.
        is_free = name != "data.shards" and all(
            rule.get(name, "if allowed") == "freely" for rule, values in zip(rules, flat, strict=True) if name in values
        )
        (others if is_free else decide).append(ComparedRow(name=option_name(name), cells=cells))
    return decide, others


def environment_rows(records: Sequence[RunRecord]) -> tuple[list[ComparedRow], list[tuple[str, str]]]:
    """Return in which facts of software and machines runs differ, and those that are the same for all."""
    rows: list[ComparedRow] = []
    same: list[tuple[str, str]] = []
    for name, title in _MACHINE.items():
        found = [_fact(name, record.environment.get(name)) for record in records]
        if not _all_equal(found):
            rows.append(ComparedRow(name=title, cells=tuple(Cell(text=text) for text in found)))
        elif found[0] != ABSENT:
            same.append((title, found[0]))
    return rows, same


def _fact(name: str, value: Any) -> str:
    if value is None:
        return ABSENT
    return " ".join(dict.fromkeys(value)) if name == "hosts" else written_option(value)


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def figure_rows(records: Sequence[RunRecord]) -> list[ComparedRow]:
    """Return the figures that `moco-fast eval` measured of runs, each beside the first run's that has one."""
    newest = [_own_results(record) for record in records]
    rows: list[ComparedRow] = []
    for task in dict.fromkeys(task for found in newest for task in found):
        of_runs = [found.get(task) for found in newest]
        there = [result for result in of_runs if result is not None]
        for name in dict.fromkeys(name for result in there for name in result.figures):
            first = next(result for result in there if name in result.figures)
            cells = tuple(_figure_cell(result, name, first) for result in of_runs)
            rows.append(ComparedRow(name=first.figures[name].title, group=" ".join(task).rstrip(), cells=cells))
    return rows


def _own_results(record: RunRecord) -> dict[tuple[str, str], Result]:
    """Return the newest result of each task and protocol of the trained encoder, not of what was measured beside it."""
    return {(result.task, result.protocol): result for result in record.results if result.step}


def _figure_cell(result: Result | None, name: str, first: Result) -> Cell:
    if result is None or name not in result.figures:
        return Cell(text=ABSENT)
    figure = result.figures[name]
    note = "" if figure.interval is None else _bounds(figure.interval, figure, signed=False)
    if result is first:
        return Cell(text=str(figure), note=note)
    if other := _measured_otherwise(first, result):
        return Cell(text=str(figure), note=f"{note}; measured otherwise: {other}".removeprefix("; "))
    return Cell(text=str(figure), note=note, difference=difference(figure, first.figures[name]))


def _measured_otherwise(first: Result, other: Result) -> str:
    """Say in what two measurements differ, so that their figures do not compare; empty: in nothing."""
    test_sets = [(result.data.get("test") or result.data.get("train") or {}).get("digest") for result in (first, other)]
    found = [] if _all_equal(test_sets) else ["other images"]
    names = dict.fromkeys((*first.settings, *other.settings))
    found += [
        f"{name} {written_option(first.settings.get(name))} -> {written_option(other.settings.get(name))}"
        for name in names
        if first.settings.get(name) != other.settings.get(name)
    ]
    return ", ".join(found)


def difference(figure: Figure, base: Figure) -> Difference:
    """Compare a figure with another one, as if they had been measured on samples of their own.

    The interval of the difference follows from the two intervals (Zou & Donner 2008; for shares with Wilson's intervals
    it is Newcombe's of 1998, method 10). Runs that were tested on the same images are told apart better than it says.
    """
    by = figure.value - base.value
    if figure.interval is None or base.interval is None:
        return Difference(text=_signed(by, figure), verdict="")
    (low, high), (base_low, base_high) = figure.interval, base.interval
    below = by - math.hypot(figure.value - low, base_high - base.value)
    above = by + math.hypot(high - figure.value, base.value - base_low)
    text = f"{_signed(by, figure)} ({_bounds((below, above), figure, signed=True)})"
    if below <= 0 <= above:
        return Difference(text=text, verdict="within the interval")
    return Difference(text=text, verdict="better" if (by > 0) == (figure.best == "highest") else "worse")


def _bounds(interval: tuple[float, float], figure: Figure, *, signed: bool) -> str:
    write: Callable[[float], str] = (lambda value: _signed(value, figure)) if signed else (lambda v: _plain(v, figure))
    return " to ".join(map(write, interval))


def _plain(value: float, figure: Figure) -> str:
    return f"{100 * value:.2f}%" if figure.unit == "share" else f"{value:.4g}"


def _signed(value: float, figure: Figure) -> str:
    return f"{100 * value:+.2f}" if figure.unit == "share" else f"{value:+.3g}"
