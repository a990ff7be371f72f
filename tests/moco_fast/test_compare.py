import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.config import to_dict
from moco_fast.evaluation.result import Figure, Result, wilson_interval, write_results
from moco_fast.presets import PRESETS
from moco_fast.report.compare import write_comparison
from moco_fast.report.differences import difference, environment_rows, figure_rows, setting_rows
from moco_fast.report.figures import NUM_STYLES, RunCurve, draw_runs, line_style, spread_apart
from moco_fast.report.hours import rank_hours, rank_hours_at
from moco_fast.report.record import read_run

SHOWN = ("step", "epoch", "samples", "time_s", "loss", "accuracy", "samples_per_s", "knn/top1")
"""What these tests look at: a chart is drawn for each value and axis."""


def rewrite(run: Path, name: str, change: Any) -> None:
    """Change a run's file of JSON, or every line of it."""
    path = run / name
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def result(value: float, *, num: int = 72, **changes: Any) -> Result:
    figure = Figure(value=value, interval=wilson_interval(value, num), title="kNN <top-1>")
    found = Result(
        task="knn",
        protocol="",
        settings={"k": [20]},
        encoder={"name": "run", "digest": "d"},
        step=40,
        data={"test": {"digest": "images"}},
        view={},
        precision="fp32",
        device="cpu",
        world_size=1,
        seeds=(0,),
        figures={"top1": figure, "mean": dataclasses.replace(figure, interval=None, title="mean per class")},
    )
    return dataclasses.replace(found, **changes)


@pytest.fixture(scope="module")
def pair(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in learning rate, device, steps and what they came to."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (Path(shutil.copytree(finished_run, folder / name)) for name in ("low", "high<b>"))
    for run, value in ((first, 0.5), (second, 0.75)):
        shutil.rmtree(run / "evaluations", ignore_errors=True)
        (run / "evaluations").mkdir()
        beside = result(0.1, step=0, encoder={"name": "untrained", "digest": "u"})
        write_results(run / "evaluations" / "knn.json", [result(value), beside])
    for run, lr in ((first, 0.06), (second, 0.24)):
        rewrite(run, "config.json", lambda config, lr=lr: config | {"optim": config["optim"] | {"lr": lr}})
    rewrite(second, "environment.json", lambda known: known | {"device": "H100", "cuda": "13.2", "world_size": 8})
    rewrite(second, "metrics.jsonl", lambda line: {name: 0.5 * value for name, value in line.items()})
    for run in (first, second):
        rewrite(run, "metrics.jsonl", lambda line: {name: value for name, value in line.items() if name in SHOWN})
    return first, second


def test_the_page_has_every_axis_and_needs_nothing_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = write_comparison(pair, tmp_path / "page.html", price_per_hour=2.0).read_text()
    links = re.findall(r'\b(?:src|href|xlink:href)="([^"]*)"', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)|<(?:iframe|object|embed|link rel=.stylesheet)", page)
    for axis in ("steps", "samples", "seconds", "cost"):
        assert f'aria-label="Loss over {axis}"' in page
        assert f'aria-label="kNN top-1 over {axis}"' in page
    for words in ("2 runs compared", "low ends with the highest kNN top-1: 65.0%", "high&lt;b&gt;", "optim.lr", "H100"):
        assert words in page
    assert "<b>" not in page
    assert len(page) < 600_000


def test_without_a_price_hours_are_counted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = write_comparison(pair, tmp_path / "page.html").read_text()
    assert 'aria-label="Loss over rank hours"' in page
    assert "Cost:" not in page
    assert "over cost" not in page


def test_whatever_a_title_holds_a_chart_is_described_by_it():
    alt = r'loss "<script>" \1 \g<x> & more'
    curve = RunCurve(run=0, x=[0.0, 1.0], values=[1.0, 2.0])
    svg = ElementTree.fromstring(draw_runs([curve], alt=alt, x_max=1))
    assert svg.get("aria-label") == alt


def test_ends_of_axes_say_where_values_are() -> None:
    curves = [RunCurve(run=0, x=[0, 50], values=[1, 3]), RunCurve(run=1, x=[0, 100], values=[2, 2])]
    svg = draw_runs(curves, alt="both", x_max=100)
    low, high, low_at, high_at = map(float, re.findall(r'data-y="([^"]*)"', svg)[0].split())
    x_low, x_high, x_low_at, x_high_at = map(float, re.findall(r'data-x="([^"]*)"', svg)[0].split())
    assert (x_low, x_high) == (0, 100)
    for number, curve in enumerate(curves):
        group = svg.partition(f'<g class="of-run-{number}">')[2]
        drawn = [
            tuple(map(float, point.split())) for point in re.findall(r"[ML] ([-\d. ]+)", group.partition("</g>")[0])
        ]
        expected = [
            (x_low_at + x * (x_high_at - x_low_at) / 100, low_at + (y - low) * (high_at - low_at) / (high - low))
            for x, y in zip(curve.x, curve.values, strict=True)
        ]
        assert [pytest.approx(point, abs=0.02) for point in expected] == drawn


def test_letters_at_the_ends_of_curves_do_not_cover_each_other() -> None:
    curves = [RunCurve(run=run, x=[0, 9], values=[run, 5.0]) for run in range(6)]
    svg = draw_runs(curves, alt="all end together", x_max=9)
    heights = sorted(float(y) for y in re.findall(r'<text [^>]*?weight: 700[^>]*? y="([-\d.]+)"', svg))
    assert len(heights) == 6
    assert all(after - before > 9 for before, after in pairwise(heights))
    assert heights[0] > 0


def test_every_run_has_a_look_of_its_own() -> None:
    looks = [line_style(run) for run in range(NUM_STYLES)]
    assert len({letter for letter, *_ in looks}) == NUM_STYLES
    assert len({look[1:] for look in looks}) == NUM_STYLES
    for (_, color, dashes), (_, next_color, next_dashes) in pairwise(looks):
        assert color != next_color
        assert dashes != next_dashes


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II, (a): 56/70 and 48/80, method 10.
    figures = [
        Figure(value=hits / num, interval=wilson_interval(hits / num, num)) for hits, num in ((56, 70), (48, 80))
    ]
    assert difference(*figures).text == "+20.00 (+5.24 to +33.39)"
    assert difference(*figures).verdict == "better"
    assert difference(*reversed(figures)).verdict == "worse"
    assert difference(figures[0], figures[0]).verdict == "within the interval"
    lower_is_better = [dataclasses.replace(figure, best="lowest") for figure in figures]
    assert difference(*lower_is_better).verdict == "worse"
    assert difference(figures[0], dataclasses.replace(figures[1], interval=None)).verdict == ""


def test_figures_stand_beside_the_first_runs(pair: tuple[Path, Path]) -> None:
    rows = figure_rows([read_run(run) for run in pair])
    assert [(row.group, row.name) for row in rows] == [("knn", "kNN <top-1>"), ("knn", "mean per class")]
    first, second = rows[0].cells
    assert (first.text, first.difference) == ("50.00%", None)
    assert second.text == "75.00%"
    assert second.difference is not None
    assert second.difference.text.startswith("+25.00 (")
    assert rows[1].cells[1].difference is not None
    assert rows[1].cells[1].difference.verdict == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"settings": {"k": [200]}}, "k 20 -> 200"), ({"data": {"test": {"digest": "others"}}}, "other images")],
)
def test_what_was_measured_otherwise_has_no_difference(
    changes: dict[str, Any], says: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    write_results(other / "evaluations" / "knn.json", [result(0.75, **changes)])
    cell = figure_rows([read_run(pair[0]), read_run(other)])[0].cells[1]
    assert cell.difference is None
    assert f"measured otherwise: {says}" in cell.note


def test_only_what_differs_is_listed_and_the_recipes_own_values_say_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    records = [read_run(run) for run in pair]
    decide, others = setting_rows(records)
    assert [(row.name, [cell.text for cell in row.cells]) for row in decide] == [("optim.lr", ["0.06", "0.24"])]
    assert [cell.note for cell in decide[0].cells] == ["default", ""]
    assert others == []
    third = Path(shutil.copytree(pair[0], tmp_path / "third"))
    config = dataclasses.replace(records[0].config, method=PRESETS["simsiam"][1].method)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, out="elsewhere", device="cuda"),
        data=dataclasses.replace(config.data, shards="others", num_threads=3),
    )
    (third / "config.json").write_text(json.dumps(to_dict(config)))
    decide, others = setting_rows([records[0], read_run(third)])
    names = {row.name: row for row in decide}
    assert {"data.shards", "method.name", "method.queue-size"} <= names.keys()
    assert names["method.queue-size"].cells[1].note == "not an option of this method"
    assert {row.name for row in others} == {"data.num-threads", "run.device"}


def test_machines_that_differ_and_what_is_the_same(pair: tuple[Path, Path]) -> None:
    rows, same = environment_rows([read_run(run) for run in pair])
    assert {row.name: [cell.text for cell in row.cells] for row in rows} == {
        "Device": ["abacus", "H100"],
        "Ranks": ["1", "8"],
        "CUDA": ["-", "13.2"],
    }
    assert ("Precision", "fp32") in same


def start(run: Path, **facts: Any) -> None:
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"device": "H100"} | facts) + "\n")


def test_hours_are_counted_over_starts_with_other_ranks(own_run: Path) -> None:
    run = own_run
    hour = 3600
    rewrite(run, "metrics.jsonl", lambda line: line | {"time_s": 9 * hour * line["step"] / 40})
    rewrite(run, "outcome.json", lambda outcome: outcome | {"at": 1e6 + 30 * hour})
    before = rank_hours(read_run(run))
    assert before is not None
    assert (before.total, before.training, before.num_starts) == (9, 9, 1)
    # Two ranks for four hours, one of them lost; then eight, from the third hour of training on.
    start(run, step=0, time_s=0.0, at=1e6, before_seen=None, world_size=2)
    start(run, step=13, time_s=3 * hour, at=1e6 + 20 * hour, before_seen=1e6 + 4 * hour, world_size=8)
    record = read_run(run)
    found = rank_hours(record)
    assert found is not None
    assert found.training == pytest.approx(2 * 3 + 8 * 6)
    assert found.total == pytest.approx(2 * 4 + 8 * 10)
    assert found.num_starts == 2
    assert rank_hours_at(record, 2 * hour) == pytest.approx(4)
    assert rank_hours_at(record, 4 * hour) == pytest.approx(6 + 8)


def test_a_run_that_does_not_say_its_ranks_has_no_hours(pair: tuple[Path, Path], tmp_path: Path) -> None:
    unknown = Path(shutil.copytree(pair[0], tmp_path / "unknown"))
    (unknown / "environment.json").unlink()
    assert rank_hours(read_run(unknown)) is None
    page = write_comparison([unknown, pair[1]], tmp_path / "page.html").read_text()
    assert 'aria-label="Loss over GPU hours"' in page
    both, one = (
        page.partition(f'aria-label="Loss over {axis}"')[2].partition("</svg>")[0] for axis in ("steps", "GPU hours")
    )
    assert ("of-run-0" in both, "of-run-0" in one, "of-run-1" in one) == (True, False, True)


def test_runs_that_have_logged_nothing_and_runs_of_one_name(finished_run: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(finished_run, tmp_path / name / "run")) for name in ("a", "b")]
    for run in runs:
        (run / "metrics.jsonl").unlink()
        shutil.rmtree(run / "evaluations", ignore_errors=True)
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert "Nothing has been measured yet" in page
    assert "a/run" in page
    assert "No option that decides what is learned" in page


def test_what_cannot_be_compared_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is named twice"):
        write_comparison([finished_run, f"{finished_run}/."], tmp_path / "page.html")
    with pytest.raises(ValueError, match="27 runs are too many"):
        write_comparison([str(number) for number in range(27)], tmp_path / "page.html")
    with pytest.raises(ValueError, match="not a run's folder"):
        write_comparison([finished_run, tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_charts_without_a_number_in_one_run_show_the_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair[0], tmp_path / "other"))
    rewrite(other, "metrics.jsonl", lambda line: {k: v for k, v in line.items() if k not in ("accuracy", "knn/top1")})
    page = write_comparison([pair[0], other], tmp_path / "page.html").read_text()
    shown = page.partition('aria-label="Contrastive accuracy over steps"')[2].partition("</svg>")[0]
    assert ("of-run-0" in shown, "of-run-1" in shown) == (True, False)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=26), st.floats(0.1, 20))
def test_heights_that_are_spread_apart_keep_their_order_and_their_places_where_they_can(
    heights: list[float], apart: float
) -> None:
    heights.sort()
    places = spread_apart(heights, apart=apart, highest=100)
    assert all(after - before >= apart - 1e-9 for before, after in pairwise(places))
    assert places[-1] <= 100
    if all(after - before >= apart for before, after in pairwise(heights)):
        assert places == pytest.approx(heights)
