"""Writer of `report.html`: configuration, progress and results of a run on one self-contained page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from moco_fast import __version__
from moco_fast.checkpoint import load_encoder
from moco_fast.config import Config
from moco_fast.evaluation.base import FigureCurve
from moco_fast.evaluation.registry import find_scores
from moco_fast.evaluation.result import Result, table
from moco_fast.evaluation.untrained import untrained_twin
from moco_fast.methods.base import Chart, Level
from moco_fast.report.commands import next_commands
from moco_fast.report.figures import Curve, draw_curves
from moco_fast.report.gauged import HEALTH_CHARTS, SPEED_CHARTS
from moco_fast.report.launch import hours_tile, launch_table, starts_table
from moco_fast.report.map import MapMethod, draw_map
from moco_fast.report.neighbors import Neighborhoods, find_neighbors
from moco_fast.report.pictures import show_views
from moco_fast.report.record import RunRecord, read_run
from moco_fast.report.words import configuration_table, environment_table, headline, tiles
from shards.ground.files import write_whole
from shards.ground.pages import page_style, prose

__all__ = ["DrawnChart", "charts_of", "open_template", "write_report"]

_NUM_NEIGHBORS = 6
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DrawnChart:
    """Chart with title and caption."""

    title: str
    caption: str
    svg: Markup


def write_report(
    run: str | Path,
    *,
    out: Path | None = None,
    device: torch.device | None = None,
    num_samples: int = 8,
    max_bank: int = 2000,
    price_per_hour: float | None = None,
    with_map: bool = False,
    map_method: MapMethod = "pca",
    cache: Path | None = None,
) -> Path:
    """Write a run's report, whatever the run's status; the page says what is still missing.

    Args:
        run: the run's folder.
        out: file to write; None: `report.html` in the run's folder.
        device: device of the encoder; default: a GPU if there is one.
        num_samples: number of samples whose views, and whose neighbors, are shown.
        max_bank: number of training samples to search for neighbors.
        price_per_hour: of one GPU, or of one rank where there is none; None: the page has no cost.
        with_map: compute what the map of embeddings needs; otherwise there is one where the cache has all that.
        map_method: how embeddings become points in a plane.
        cache: folder of the features that evaluations cache; None: the user's.

    Returns:
        path of the page.

    Raises:
        ValueError: the folder does not belong to a run.
    """
    record = read_run(run)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    maps, no_map = _unless_missing(
        lambda: [draw_map(record, device=device, method=map_method, compute=with_map, cache=cache)]
    )
    page = open_template("report.html").render(
        record=record,
        headline=headline(record),
        warnings=[(f"{line['step']:,}", line["warning"]) for line in record.warnings],
        tiles=[*tiles(record), *hours_tile(record, price_per_hour)],
        learning=_charts(record, "learning"),
        worth=table(record.results) if record.results else [],
        worth_curves=_result_curves(record.results),
        health=_charts(record, "health"),
        speed=_drawn(record, SPEED_CHARTS),
        **_pictures(record, device, num_samples, max_bank),
        map=maps[0] if maps else None,
        no_map=no_map,
        configuration=configuration_table(record),
        environment=environment_table(record),
        launch=launch_table(record),
        starts=starts_table(record),
        commands=next_commands(record),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    path = out or record.path / "report.html"
    write_whole(path, page, durable=False)
    return path


def open_template(name: str) -> Template:
    """Return a page of this folder; what it is given is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"prose": _prose, "sentence": _sentence}
    return pages.get_template(name, globals={"page_style": Markup(page_style())})  # noqa: S704 - a file of ours


def _prose(text: str) -> Markup:
    return Markup(prose(text))  # noqa: S704 - escaped there


def _sentence(text: str) -> Markup:
    return _prose(text[:1].upper() + text[1:])


def _pictures(record: RunRecord, device: torch.device, num_samples: int, max_bank: int) -> dict[str, Any]:
    """Return what the page shows of views and neighbors, or why it cannot."""
    # The last finished epoch: every sample shown has been used in training with these views.
    epoch = max(int(record.last["epoch"]) - 1, 0)
    samples, no_samples = _unless_missing(lambda: show_views(record.config, epoch=epoch, num_samples=num_samples))
    near, no_neighbors = _unless_missing(lambda: [_neighbors(record, device, num_samples, max_bank)])
    return {
        "epoch": epoch,
        "samples": samples,
        "no_samples": no_samples,
        "near": near[0] if near else None,
        "no_neighbors": no_neighbors,
    }


def _unless_missing(make: Callable[[], list[T]]) -> tuple[list[T], str]:
    """Return the result of `make`, or nothing and the reason: shards may have moved, checkpoints may not exist yet."""
    try:
        return make(), ""
    except (ValueError, OSError) as error:
        return [], str(error)


def _neighbors(record: RunRecord, device: torch.device, num_queries: int, max_bank: int) -> Neighborhoods:
    config, encoder = load_encoder(record.path)
    return find_neighbors(
        encoder.to(device),
        untrained_twin(config).to(device),
        record.config,  # Where sets lie, and what is evaluated, may have changed since the checkpoint.
        device=device,
        num_queries=num_queries,
        num_neighbors=_NUM_NEIGHBORS,
        max_bank=max_bank,
    )


_LEARNING_RATE = Chart(
    title="Learning rate", caption="The value that the optimizer used.", curves={"lr": ""}, from_zero=True
)
_PROBE = Chart(
    title="Online probe on training views",
    caption="Share of the labeled samples of a batch that the classifier names which is trained beside the run.",
    curves={"probe/top1": ""},
    percent=True,
    from_zero=True,
)


def _charts(record: RunRecord, about: str) -> list[DrawnChart]:
    """Draw the figures of evaluations and the values that the method watches."""
    figures: list[DrawnChart] = []
    for score in find_scores(record.config):
        untrained = [value for step, value in record.curve(score.figure) if step == 0]
        level = Level(value=untrained[0], label=record.start) if untrained else None
        figures += _drawn(record, [score], about, level=level, points=True)
    return figures + _drawn(record, charts_of(record.config), about)


def charts_of(config: Config) -> tuple[Chart, ...]:
    """Return the charts of what a run's metrics hold besides its evaluations and its speed."""
    of_method = config.method.charts(config.data.batch_size, config.views.num_small)
    return (*of_method, *HEALTH_CHARTS, _PROBE, _LEARNING_RATE)


def _result_curves(results: Sequence[Result]) -> list[DrawnChart]:
    """Draw the curves of results, with a line for each of two encoders; of the same encoder the last result counts."""
    by_name: dict[str, dict[str, FigureCurve]] = {}
    for result in results:
        for name, curve in result.curves.items():
            if curve.in_report:
                by_name.setdefault(f"{result.task}/{name}", {})[result.encoder["name"]] = curve
    charts: list[DrawnChart] = []
    for of_encoders in by_name.values():
        first = next(iter(of_encoders.values()))
        svg = draw_curves(
            [
                # What is said of an encoder in parentheses has no room in a chart.
                Curve(
                    steps=[x for x, _ in curve.points],
                    values=[y for _, y in curve.points],
                    label=name.partition(" (")[0],
                    points=True,
                )
                for name, curve in of_encoders.items()
            ],
            alt=f"{first.title} over {first.over}",
            percent=first.unit == "share",
            from_zero=True,
        )
        safe = Markup(svg)  # noqa: S704 - figures.py and matplotlib escape text
        charts.append(DrawnChart(title=first.title, caption=first.caption, svg=safe))
    return charts


def _drawn(
    record: RunRecord,
    charts: Sequence[Chart],
    about: str = "learning",
    *,
    level: Level | None = None,
    points: bool = False,
) -> list[DrawnChart]:
    """Draw the charts of a section for which values exist; `level` is for charts without their own."""
    figures: list[DrawnChart] = []
    for chart in charts:
        curves = [
            Curve(steps=[step for step, _ in values], values=[value for _, value in values], label=label, points=points)
            for name, label in chart.curves.items()
            if (values := record.curve(name))
        ]
        if chart.about == about and curves:
            svg = draw_curves(
                curves,
                alt=f"{chart.title} over training steps",
                level=chart.level or level,
                percent=chart.percent,
                from_zero=chart.from_zero,
            )
            safe = Markup(svg)  # noqa: S704 - figures.py and matplotlib escape text
            figures.append(DrawnChart(title=chart.title, caption=chart.caption, svg=safe))
    return figures
