"""Page of what `moco-fast transfer` wrote into a folder: figures, losses, classes and pictures of each preset."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from moco_fast import __version__
from moco_fast.evaluation.result import Result, read_results, with_interval
from moco_fast.report.figures import RunCurve, draw_runs, line_style
from moco_fast.report.report import DrawnChart, open_template
from moco_fast.report.words import Tile
from moco_fast.transfer.compare import difference
from moco_fast.transfer.pictures import Gallery, ShownImage, color_of
from moco_fast.transfer.written import RESULTS, read_class_rows
from shards.ground.files import write_whole

__all__ = ["write_transfers"]

_NUM_TILES = 6
_NUM_OPEN = 30  # classes of a table that is not folded
_LEADING = ("AP", "IoU")
"""Columns of a class of which one is shown, in the order of preference."""


@dataclass(frozen=True, kw_only=True)
class _ShownInit:
    """Initial weights, with the letter, color and dashes of their curve."""

    number: int
    name: str
    letter: str
    color: int
    dashes: str
    gallery: Gallery | None
    no_gallery: str
    """Why there are no pictures; empty: there are."""


@dataclass(frozen=True, kw_only=True)
class _ShownPreset:
    """What a page shows of a preset."""

    name: str
    title: str
    inits: list[_ShownInit]
    tiles: list[Tile]
    figures: list[tuple[str, str, list[tuple[str, str]]]]
    """Title, caption, and for each init the value and its difference from the first."""
    charts: list[DrawnChart]
    classes: list[list[str]]
    """Lines of cells, the first one a heading; empty: there are none."""
    same: list[list[tuple[str, ShownImage]]]
    """Images that are shown for each init: its letter and the picture."""
    notes: list[str]
    settings: dict[str, Any]
    where: list[str]


def write_transfers(folder: Path, *, out: Path | None = None) -> Path:
    """Write the page of a folder that `moco-fast transfer` wrote, from what is kept there.

    Args:
        folder: of results.json.
        out: file to write; None: `report.html` in the folder.

    Returns:
        path of the page.

    Raises:
        ValueError: results.json or a file of pictures is damaged.
    """
    by_preset: dict[tuple[str, str], list[Result]] = {}
    for result in read_results(folder / RESULTS):
        by_preset.setdefault((result.task, result.protocol), []).append(result)
    rows = read_class_rows(folder)
    presets = [
        _preset(folder, results, [row for row in rows if row["preset"] == protocol])
        for (_, protocol), results in by_preset.items()
    ]
    page = open_template("transfers.html").render(
        folder=folder,
        presets=presets,
        color=lambda label: "#{:02x}{:02x}{:02x}".format(*color_of(label)),
        num_open=_NUM_OPEN,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    path = out or folder / "report.html"
    write_whole(path, page, durable=False)
    return path


def _preset(folder: Path, results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> _ShownPreset:
    first = results[0]
    inits = [_init(folder, number, result, rows) for number, result in enumerate(results)]
    return _ShownPreset(
        name=f"{first.task} {first.protocol}",
        title=str(first.settings.get("title", "")),
        inits=inits,
        tiles=_tiles(results),
        figures=[
            (figure.title, figure.caption, [_cell(results, number, name) for number in range(len(results))])
            for name, figure in first.figures.items()
        ],
        charts=_charts(results),
        classes=_class_table(results, rows),
        same=_same_images(inits),
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
        settings={name: _written(value) for name, value in first.settings.items() if name != "title"},
        where=[
            f"{split}: {each['num_samples']:,} images of {each['num_classes']:,} classes, {each['where']}"
            for split, each in first.data.items()
        ],
    )


def _init(folder: Path, number: int, result: Result, rows: Sequence[dict[str, Any]]) -> _ShownInit:
    letter, color, dashes = line_style(number)
    name = result.encoder["name"]
    # The first seed's are shown.
    training = next((row.get("training") for row in rows if row["init"] == name), None)
    gallery, reason = None, "per-class.csv does not name its training"
    if training is not None:
        try:
            gallery, reason = Gallery.read(folder / "pictures" / f"{training}.json"), ""
        except ValueError as error:
            reason = str(error)
    return _ShownInit(
        number=number,
        name=name,
        letter=letter,
        color=color,
        dashes=" ".join(map(str, dashes)),
        gallery=gallery,
        no_gallery=reason,
    )


def _cell(results: Sequence[Result], number: int, figure: str) -> tuple[str, str]:
    """Return an init's figure, and its difference from the first init's."""
    first, own = results[0].figures[figure], results[number].figures.get(figure)
    if own is None:
        return "-", ""
    # Other numbers of seeds have no pairs: the command was stopped between two inits.
    is_paired = number and len(own.by_seed) == len(first.by_seed)
    return with_interval(own), difference(first, own) if is_paired else ""


def _tiles(results: Sequence[Result]) -> list[Tile]:
    name, figure = next(iter(results[0].figures.items()))
    tiles: list[Tile] = []
    for number, result in enumerate(results[:_NUM_TILES]):
        value, apart = str(result.figures[name]), _cell(results, number, name)[1]
        short = result.encoder["name"].partition(" (")[0]
        tiles.append(Tile(name=short, value=value, note=f"{figure.title}{f', {apart} points' if apart else ''}"))
    return tiles


def _charts(results: Sequence[Result]) -> list[DrawnChart]:
    """Draw the curves that results have, those of all inits in one chart."""
    charts: list[DrawnChart] = []
    for name, first in results[0].curves.items():
        curves = [
            RunCurve(run=number, x=[x for x, _ in points], values=[y for _, y in points])
            for number, result in enumerate(results)
            if name in result.curves and (points := result.curves[name].points)
        ]
        if curves:
            end = max(curve.x[-1] for curve in curves)
            alt = f"{first.title} over {first.over}"
            svg = draw_runs(curves, alt=alt, x_max=end, percent=first.unit == "share", from_zero=True)
            safe = Markup(svg)  # noqa: S704 - figures.py and matplotlib escape text
            title = first.title[:1].upper() + first.title[1:]
            charts.append(DrawnChart(title=title, caption=first.caption, svg=safe))
    return charts


def _class_table(results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the leading figure of each class, a column for each init: means over the seeds, in percent."""
    if not rows:
        return []
    column = next((name for name in _LEADING if name in rows[0]), None)
    if column is None:
        return []
    counted = next((name for name in ("objects", "pixels") if name in rows[0]), None)
    names = [result.encoder["name"] for result in results]
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    counts: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row["class"], row.get("of", "")
        cells.setdefault(key, {}).setdefault(row["init"], []).append(float(row[column]))
        counts[key] = f"{int(row[counted]):,}" if counted else ""
    heading = ["class", counted or "", *(f"{column} {line_style(number)[0]}" for number in range(len(names)))]
    lines = [heading]
    for (name, of), by_init in cells.items():
        shown = [f"{fmean(by_init[init]):.2f}" if init in by_init else "-" for init in names]
        lines.append([f"{name} ({of})" if of else name, counts[name, of], *shown])
    return lines


def _same_images(inits: Sequence[_ShownInit]) -> list[list[tuple[str, ShownImage]]]:
    """Return the images that every init's test shows, whatever was found in them."""
    galleries = [(init.letter, init.gallery) for init in inits if init.gallery is not None]
    if not galleries:
        return []
    shared = set.intersection(*(set(gallery.chosen.spread) for _, gallery in galleries))
    return [[(letter, gallery.images[number]) for letter, gallery in galleries] for number in sorted(shared)]


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
