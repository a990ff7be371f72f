"""Curves and histograms as inline SVG with the page's colors and fonts."""

import io
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moco_fast.methods.base import Level

__all__ = [
    "NUM_STYLES",
    "Curve",
    "RunCurve",
    "draw_curves",
    "draw_histogram",
    "draw_runs",
    "line_style",
    "spread_apart",
    "thin_out",
]

_INK, _FAINT = "#010101", "#020202"
_SERIES = ("#030303", "#040404")
_NUM_COLORS = 8
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2))
_RUNS = tuple(f"#0505{number:02x}" for number in range(_NUM_COLORS))
# Placeholder colors that no curve would have otherwise, each replaced by a variable of the page.
_VARIABLES = {_INK: "var(--muted)", _FAINT: "var(--line)", _SERIES[0]: "var(--query)", _SERIES[1]: "var(--key)"} | {
    color: f"var(--run-{number})" for number, color in enumerate(_RUNS)
}
_MAX_POINTS = 400
_INCHES = 5.4  # of a chart's width
NUM_STYLES = 26
"""Runs that one chart can tell apart: each has a letter, a color and dashes."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Quantity over the steps of a run."""

    steps: Sequence[float]
    values: Sequence[float]
    label: str = ""
    points: bool = False
    """Mark each value: for quantities measured only a few times."""


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """Quantity of one of several runs that are drawn into one chart."""

    run: int
    """Number of the run, which decides letter, color and dashes."""
    x: Sequence[float]
    values: Sequence[float]


def line_style(run: int) -> tuple[str, int, tuple[float, ...]]:
    """Return the letter, the number of the page's color and the dashes (on, off, ... in points) of a run's curves."""
    # Runs that have the same color have other dashes, and so have neighbors.
    return chr(ord("A") + run), run % _NUM_COLORS, _DASHES[(run + run // _NUM_COLORS) % len(_DASHES)]


def draw_curves(
    curves: Sequence[Curve],
    *,
    alt: str,
    level: Level | None = None,
    percent: bool = False,
    from_zero: bool = False,
    height: float = 2.3,
) -> str:
    """Draw at most two curves into one SVG element.

    Args:
        curves: the curves, the first in the query's color, the second in the key's.
        alt: description of the chart in words.
        level: reference value.
        percent: values are fractions; write them as percentages.
        from_zero: the vertical axis starts at 0.
        height: in inches at a width of 5.4; the page scales both.
    """
    with _drawing(alt, height) as (axes, written):
        for curve, color in zip(curves, _SERIES, strict=False):
            steps, values = thin_out(curve.steps, curve.values)
            axes.plot(
                steps,
                values,
                color=color,
                linewidth=1.8,
                marker="o" if curve.points else "",
                markersize=4.5,
                clip_on=not curve.points,
            )
        if level is not None:
            axes.axhline(level.value, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        _dress(axes, percent=percent)
        axes.set_xlim(left=0)
        if from_zero:
            _begin_at_zero(axes)
        if level is not None:
            _write_level(axes, level)
        for curve, color in zip(curves, _SERIES, strict=False):
            _write_label(axes, curve, color)
    return written()


def draw_histogram(
    counts: Sequence[int], edges: Sequence[float], *, alt: str, mark: Level | None = None, height: float = 1.9
) -> str:
    """Draw a histogram into one SVG element.

    Args:
        counts: of each bin.
        edges: of the bins, one more than counts.
        alt: description of the chart in words.
        mark: value on the horizontal axis to mark.
        height: in inches at a width of 5.4; the page scales both.
    """
    with _drawing(alt, height) as (axes, written):
        axes.stairs(counts, edges, fill=True, color=_SERIES[1])
        _dress(axes, percent=False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_ylim(bottom=0)
        if mark is not None:
            axes.axvline(mark.value, color=_SERIES[0], linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(
                mark.label,
                (mark.value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-5, -10),
                textcoords="offset points",
                ha="right",
                color=_SERIES[0],
            )
    return written()


def draw_runs(
    curves: Sequence[RunCurve],
    *,
    alt: str,
    x_max: float,
    level: Level | None = None,
    points: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    height: float = 2.5,
) -> str:
    """Draw the same quantity of several runs into one SVG element, each curve with its letter at its end.

    The page can hide a run's curve by the class `of-run-N`. `data-x` and `data-y` say which values the ends of the axes
    have, and where they are: low, high, place of low, place of high.

    Args:
        curves: at most one for each run.
        alt: description of the chart in words.
        x_max: end of the horizontal axis, the same in all charts that are to be compared.
        level: reference value.
        points: mark each value: for quantities measured only a few times.
        percent: values are fractions; write them as percentages.
        from_zero: the vertical axis starts at 0.
        height: in inches at a width of 5.4; the page scales both.
    """
    left, right, bottom, top = 0.115, 0.95, 0.28 / height, 1 - 0.09 / height
    scale = ""
    with _drawing(alt, height, places=(left, bottom, right - left, top - bottom)) as (axes, written):
        ends: list[tuple[RunCurve, float, float]] = []
        for curve in curves:
            _, color, dashes = line_style(curve.run)
            x, values = thin_out(curve.x, curve.values)
            style = (0, dashes) if dashes else "solid"
            marker = "o" if points else ""
            [line] = axes.plot(x, values, color=_RUNS[color], linewidth=1.7, linestyle=style, marker=marker)
            line.set(markersize=4.5, clip_on=not points, gid=f"of-run-{curve.run}")
            ends.append((curve, float(x[-1]), float(values[-1])))
        if level is not None:
            axes.axhline(level.value, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        _dress(axes, percent=percent)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(0, x_max or 1)
        if from_zero:
            _begin_at_zero(axes)
        if level is not None:
            _write_level(axes, level)
        _write_letters(axes, ends, points_high=72 * height * (top - bottom))
        low, high = axes.get_ylim()
        wide, tall = 72 * _INCHES, 72 * height
        scale = f' data-x="0 {x_max or 1:.8g} {wide * left:.2f} {wide * right:.2f}"'
        scale += f' data-y="{low:.8g} {high:.8g} {tall * (1 - bottom):.2f} {tall * (1 - top):.2f}"'
    return written().replace("<svg", f"<svg{scale}", 1)


def _write_letters(axes: Axes, ends: Sequence[tuple[RunCurve, float, float]], *, points_high: float) -> None:
    """Write each run's letter at the end of its curve, moved up or down where letters would cover each other."""
    low, high = axes.get_ylim()
    apart = 10.5 * (high - low) / points_high  # a letter's height
    places: dict[int, float] = {}
    for _, group in groupby(sorted(ends, key=lambda end: end[1:]), key=lambda end: end[1]):
        runs, heights = zip(*((curve.run, y) for curve, _, y in group), strict=True)
        places |= zip(runs, spread_apart(heights, apart=apart, highest=high), strict=True)
    for curve, x, _ in ends:
        letter, color, _ = line_style(curve.run)
        text = axes.annotate(
            letter,
            (x, places[curve.run]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_RUNS[color],
            fontweight="bold",
            annotation_clip=False,
        )
        text.set_gid(f"of-run-{curve.run}")


def spread_apart(heights: Sequence[float], *, apart: float, highest: float) -> list[float]:
    """Move heights, in rising order, so that neighbors are `apart` and none is above `highest`."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + apart) if places else height)
    for number in reversed(range(len(places))):
        above = highest if number == len(places) - 1 else places[number + 1] - apart
        places[number] = min(places[number], above)
    return places


@contextmanager
def _drawing(
    alt: str, height: float, *, places: tuple[float, float, float, float] | None = None
) -> Generator[tuple[Axes, Callable[[], str]]]:
    """Give axes to draw on, and what returns the SVG element after the block.

    `places` are left, bottom, width and height of the axes as shares of the whole; None: as its words need.
    """
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt, "font.size": 10.5}):
        figure = Figure(figsize=(_INCHES, height), layout="constrained" if places is None else None, facecolor="none")
        axes = figure.add_subplot(facecolor="none") if places is None else figure.add_axes(places, facecolor="none")
        yield axes, lambda: _for_page(out.getvalue(), alt)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})


def thin_out(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points until at most a few hundred are left; return steps and values."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_POINTS))
    at, of = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    return np.array([at[group].mean() for group in groups]), np.array([of[group].mean() for group in groups])


def _dress(axes: Axes, *, percent: bool) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK, pad=6)
    axes.margins(x=0.02, y=0.12)
    # Steps, levels and bins are whole; what is varied may be a share.
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axes.dataLim.x1 > 1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _begin_at_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    # Where all values are 0, rounding errors would be the scale.
    if axes.dataLim.y1 <= 0:
        axes.set_ylim(top=1)


def _write_level(axes: Axes, level: Level) -> None:
    axes.annotate(
        level.label,
        (1, level.value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=_INK,
    )


def _write_label(axes: Axes, curve: Curve, color: str) -> None:
    """Write a curve's name above its middle, which is easier to read than a legend."""
    if not curve.label or not len(curve.steps):
        return
    steps, values = thin_out(curve.steps, curve.values)
    middle = len(steps) // 2
    axes.annotate(
        curve.label,
        (steps[middle], values[middle]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        color=color,
    )


def _for_page(svg: str, alt: str) -> str:
    """Extract the SVG element from its document and leave colors, fonts and size to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    # A title of someone else's results may hold anything: no quote ends the attribute, no backslash is a group's.
    role = f' role="img" aria-label="{escape(alt)}"'
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda found: found[1] + role, svg, count=1)
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<g/>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"(of-run-\d+)\"", r'<g class="\1"', svg)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
