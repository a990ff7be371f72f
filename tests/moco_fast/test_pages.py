"""Pages in a browser, on a phone and on a desk: nothing scrolls sideways, no complaints, controls that work."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moco_fast.cli import main
from moco_fast.report.compare import write_comparison
from moco_fast.report.report import write_report
from tests.browser import DESK, PHONE, Browser, open_browser, what_is_wrong
from tests.moco_fast.transfer.coco_shapes import write_coco
from tests.moco_fast.transfer.test_command import PLAIN

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cpu = torch.device("cpu")
    return write_report(
        finished_run, out=folder / "report.html", device=cpu, num_samples=2, with_map=True, cache=folder / "cache"
    )


@pytest.fixture(scope="module")
def without_labels(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run without held-out samples that was warned of something."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("without-labels") / "run"))
    config = json.loads((run / "config.json").read_text())
    config["eval"]["shards"] = None
    (run / "config.json").write_text(json.dumps(config))
    warning = {"step": 1200, "about": "lag", "warning": "the key encoder lags behind: lower --method.momentum " * 4}
    (run / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    return write_report(run, device=torch.device("cpu"), num_samples=2)


@pytest.fixture(scope="module")
def comparison(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    runs = [
        Path(shutil.copytree(finished_run, folder / name)) for name in ("a-name-that-is-long-" * 3, "other", "third")
    ]
    shown = ("step", "epoch", "samples", "time_s", "loss", "knn/top1")
    for number, run in enumerate(runs):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        kept = [{name: line[name] / (1 + (number == 1)) for name in shown if name in line} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return write_comparison(runs, folder / "comparison.html")


@pytest.fixture(scope="module")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two trainings of detectors, with masks."""
    folder = tmp_path_factory.mktemp("transfers")
    write_coco(folder / "coco", {"train2017": 2, "val2017": 3})
    words = ("--network", "resnet18_quarter", "--out", str(folder / "out"), "--seeds", "2", *PLAIN)
    data = ("--preset", "coco-c4-1x", "--data", str(folder / "coco"), "--init", "random")
    assert main(["transfer", "detect", *data, *words, "--steps", "1"]) == 0
    return folder / "out" / "report.html"


@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("name", ["report", "without_labels", "comparison", "transfers"])
def test_nothing_is_wrong(name: str, size: tuple[int, int], browser: Browser, request: pytest.FixtureRequest) -> None:
    page: Path = request.getfixturevalue(name)
    assert what_is_wrong(browser, page, size) == []


def test_what_is_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 2000px">wide</div>'
        "<canvas></canvas><script>console.warn('careful'); nothing.at.all</script>"
    )
    found = "\n".join(what_is_wrong(browser, page, PHONE))
    for words in ("careful", "nothing is not defined", "scrolls sideways", "1 pictures without words"):
        assert words in found


def shown(browser: Browser) -> list[str]:
    """Descriptions of the charts that can be seen."""
    script = "[...document.querySelectorAll('svg[data-x]')].filter(e => e.getClientRects().length)"
    return browser.run(f"{script}.map(e => e.getAttribute('aria-label'))")


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_switch_changes_what_all_charts_are_over(size: tuple[int, int], browser: Browser, comparison: Path) -> None:
    browser.open(comparison, size)
    over_steps = shown(browser)
    assert over_steps
    assert all(label.endswith(" over steps") for label in over_steps)
    browser.click(*browser.center_of("#axis-samples"))
    assert shown(browser) == [label.replace("over steps", "over samples") for label in over_steps]
    # The next one by the keyboard.
    browser.press("ArrowRight")
    assert shown(browser) == [label.replace("over steps", "over seconds") for label in over_steps]
    assert browser.complaints == []


def test_a_run_can_be_hidden(browser: Browser, comparison: Path) -> None:
    browser.open(comparison, DESK)
    visible = "[...document.querySelectorAll('svg .of-run-1')].filter(e => e.getClientRects().length).length"
    assert browser.run(visible) > 0
    browser.click(*browser.center_of("#run-1"))
    assert browser.run(visible) == 0
    browser.click(*browser.center_of("#run-1"))
    assert browser.run(visible) > 0


def read_out(browser: Browser) -> list[str]:
    script = "[...document.querySelectorAll('.readout:not([hidden]) > div')].map(e => e.textContent)"
    return browser.run(script)


def test_values_are_read_where_one_points_and_with_the_keyboard(browser: Browser, comparison: Path) -> None:
    browser.open(comparison, DESK)
    chart = 'figure.chart svg[aria-label="kNN top-1 over steps"]'
    browser.center_of(chart)
    place = browser.run(
        f"(() => {{ const svg = document.querySelector({chart!r}), b = svg.getBoundingClientRect();"
        " const [, , low, high] = svg.dataset.x.split(' ').map(Number), scale = b.width / svg.viewBox.baseVal.width;"
        " return [b.x + scale * (low + high) / 2, b.y + b.height / 2] })()"
    )
    assert read_out(browser) == []
    browser.move(*place)
    # Its steps are halved, too: there its last value is the half of 0.65.
    assert read_out(browser) == [" steps 20", "A45.0%", "B32.5%", "C45.0%"]
    browser.click(*browser.center_of("#run-0"))
    assert read_out(browser) == []
    browser.run(f"document.querySelector({chart!r}).closest('figure').focus()")
    browser.press("Home")
    assert read_out(browser)[1:] == ["B12.5%", "C25.0%"]
    browser.press("End")
    assert read_out(browser)[1:] == ["C65.0%"]
    browser.press("Escape")
    assert read_out(browser) == []
    assert browser.complaints == []


def test_dark_pages_are_dark(browser: Browser, comparison: Path) -> None:
    colors = {}
    for dark in (False, True):
        browser.open(comparison, DESK, dark=dark)
        text = browser.run("getComputedStyle(document.body).backgroundColor")
        colors[dark] = sum(map(int, text.strip("rgb()").split(","))) / 3
    assert colors[False] > 200
    assert colors[True] < 60


MAP = "figure.map canvas[tabindex]"


def card(browser: Browser) -> str:
    return browser.run("document.querySelector('.map .card:not([hidden])')?.innerText ?? ''")


def test_samples_of_the_map_are_seen_where_one_points_and_with_the_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report, DESK)
    x, y = browser.center_of(MAP)
    ink = (
        "(() => { const c = document.querySelector('figure.map canvas'), p = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; return p.filter((v, i) => i % 4 === 3 && v > 0).length })()"
    )
    assert browser.run(ink) > 72
    assert card(browser) == ""
    browser.run(f"document.querySelector({MAP!r}).focus()")
    browser.press("+")
    # The one that is nearest to the middle.
    seen = card(browser)
    assert "key " in seen
    assert "sample " in seen
    browser.press("Escape")
    assert card(browser) == ""
    browser.press("0")
    assert card(browser) != ""
    browser.press("Escape")
    for place in range(0, 900, 9):
        browser.move(x - 450 + place, y)
        if card(browser):
            break
    assert "key " in card(browser)
    assert browser.complaints == []


def test_a_class_can_be_highlighted(browser: Browser, report: Path) -> None:
    browser.open(report, DESK)
    name = browser.run("document.querySelector('[data-group]').dataset.name")
    pressed = "[...document.querySelectorAll('[data-group][aria-pressed=true]')].map(e => e.dataset.name)"
    browser.click(*browser.center_of("[data-group]"))
    assert browser.run(pressed) == [name]
    browser.run(f"document.querySelector({MAP!r}).focus()")
    browser.press("+")
    assert card(browser).startswith(name)
    browser.click(*browser.center_of("[data-group]"))
    assert browser.run(pressed) == []
