import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moco_fast.checkpoint import load_encoder
from moco_fast.config import to_dict
from moco_fast.evaluation.base import FigureCurve
from moco_fast.evaluation.features import set_features
from moco_fast.evaluation.result import Figure, Result, write_results
from moco_fast.evaluation.untrained import untrained_twin
from moco_fast.methods.base import Level, Method
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.presets import PRESETS
from moco_fast.report.figures import Curve, draw_curves, thin_out
from moco_fast.report.neighbors import find_neighbors
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.report.words import configuration_table, headline
from moco_fast.training.state import Beat, write_beat
from pipelines.loader import open_loader
from shards import PackConfig, pack
from shards.ground.locks import locked
from shards.sets import open_set

VOID = {"meta", "link", "img", "br", "hr", "input", "image", "rect", "path", "use", "circle", "line"}


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, list[str]] = {}
        self.boxes: dict[str, list[tuple[int, ...]]] = {"of-query": [], "of-key": []}
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed")
        self.links += [value for name in ("src", "href", "xlink:href", "srcset") if (value := values.get(name))]
        if tag == "img":
            self.images.setdefault(values["alt"] or "", []).append(values["src"] or "")
        if tag == "rect" and values.get("class") in self.boxes:
            box = tuple(int(values[name] or "") for name in ("x", "y", "width", "height"))
            self.boxes[values["class"] or ""].append(box)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(run: Path, **options: Any) -> Page:
    path = write_report(run, device=torch.device("cpu"), **options)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def pixels(url: str) -> np.ndarray:
    assert url.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write(Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("page") / "run")), num_samples=4)


@pytest.fixture
def run(own_run: Path) -> Path:
    return own_run


def change(run: Path, **sections: dict[str, Any]) -> None:
    """Change fields of a run's configuration."""
    config = json.loads((run / "config.json").read_text())
    for section, fields in sections.items():
        config[section] |= fields
    (run / "config.json").write_text(json.dumps(config))


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert page.open == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert "prefers-color-scheme: dark" in style
    assert len(page.html) < 2_000_000


def test_it_says_what_was_run_and_what_came_of_it(page: Page) -> None:
    for words in (
        "cifar10 · resnet18_quarter",
        "Finished: 40 steps (4.44 epochs, 1,280 samples) in 1 min 40 s.",
        "abacus",
        "65.0%",
        "untrained 25.0%, +40.0 points",
        "25.0% of the time waiting for data",
        "python -m moco_fast.train cifar10",
        "moco-fast eval knn --encoder",
        "moco-fast export",
    ):
        assert words in page.text
    for chart in ("kNN top-1", "Loss", "Learning rate", "Similarities", "Spread of the queries", "Waiting for data"):
        assert chart in page.text
        assert f'aria-label="{chart} over training steps"' in page.html


def test_views_are_those_that_training_saw(page: Page, finished_run: Path) -> None:
    config = read_run(finished_run).config
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    loader = open_loader(config.data, config.views, seed=config.run.seed, device=torch.device("cpu"))
    try:
        loader.load_state_dict({"epoch": 3, "step": 0})  # 40 steps are 4.4 epochs: the fourth is the last whole one
        for batch in loader:
            views = [view.permute(0, 2, 3, 1).numpy() for view in batch.views]
            seen |= {int(index): (q.copy(), k.copy()) for index, q, k in zip(batch.index, *views, strict=True)}
    finally:
        loader.close()
    assert "as in epoch 4" in page.text
    shown = [int(number) for number in re.findall(r"sample (\d+)</div>", page.html)]
    assert shown == [0, 96, 191, 287]
    for place, index in enumerate(shown):
        for kind, name in enumerate(("query view", "key view")):
            assert np.array_equal(pixels(page.images[name][place]), seen[index][kind])


def test_boxes_lie_where_the_views_were_cut(page: Page, finished_run: Path) -> None:
    from pipelines.preview import draw

    config = read_run(finished_run).config
    previews = draw(
        open_set(config.data.shards), config.views, seed=config.run.seed, epoch=3, indices=[0, 96, 191, 287]
    )
    assert page.boxes["of-query"] == [preview.boxes[0] for preview in previews]
    assert page.boxes["of-key"] == [preview.boxes[1] for preview in previews]


def test_neighbors_agree_with_a_plain_search(finished_run: Path) -> None:
    cpu = torch.device("cpu")
    config, trained = load_encoder(finished_run)
    assert config.eval.shards is not None
    untrained = untrained_twin(config)
    found = find_neighbors(trained, untrained, config, device=cpu, num_queries=5, num_neighbors=4, max_bank=10_000)
    names = open_set(config.data.shards).class_names
    assert (found.are_held_out, found.are_judged) == (True, True)
    assert len(found.queries) == 5
    assert len({query.label for query in found.queries}) == 5
    for encoder, which in ((trained, "trained"), (untrained, "untrained")):
        bank, held_out = (
            set_features(encoder, open_set(shards), layer="head", size=32, crop=1.0, data=config.data, device=cpu)
            for shards in (config.data.shards, config.eval.shards)
        )
        for query in found.queries:
            row = held_out.labels.tolist().index(names.index(query.label))
            similarity = bank.values @ held_out.values[row]
            nearest = sorted(range(len(bank)), key=lambda place: -float(similarity[place]))[:4]
            shown = getattr(query, which)
            assert [n.label for n in shown] == [names[int(bank.labels[place])] for place in nearest]
            assert [n.is_right for n in shown] == [n.label == query.label for n in shown]
            assert [n.similarity for n in shown] == pytest.approx([float(similarity[p]) for p in nearest], abs=1e-4)


@pytest.fixture(scope="module")
def unlabeled(packed_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out images without labels, in one folder."""
    out = tmp_path_factory.mktemp("unlabeled") / "val"
    pack(PackConfig(sources=(str(packed_demo.images / "val"),), out=str(out), labels="none", workers=1))
    return out


@pytest.mark.parametrize("is_held_out", [True, False])
def test_without_labels_there_are_neighbors_without_marks(
    is_held_out: bool, finished_run: Path, unlabeled: Path
) -> None:
    cpu = torch.device("cpu")
    config, trained = load_encoder(finished_run)
    bank_shards = config.data.shards if is_held_out else str(unlabeled)
    asked_shards = str(unlabeled)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shards=bank_shards),
        eval=dataclasses.replace(config.eval, shards=asked_shards if is_held_out else None),
    )
    found = find_neighbors(
        trained, untrained_twin(config), config, device=cpu, num_queries=5, num_neighbors=4, max_bank=10_000
    )
    assert (found.are_held_out, found.are_judged) == (is_held_out, False)
    assert found.num_right("trained") == (0, 20)
    bank, asked = (
        set_features(trained, open_set(each), layer="head", size=32, crop=1.0, data=config.data, device=cpu)
        for each in (bank_shards, asked_shards)
    )
    for number, query in enumerate(found.queries):
        row = number * 72 // 5
        assert query.label == f"sample {row}"
        similarity = bank.values @ asked.values[row]
        others = [place for place in range(len(bank)) if is_held_out or place != row]
        nearest = sorted(others, key=lambda place: -float(similarity[place]))[:4]
        assert [n.label for n in query.trained] == [f"sample {place}" for place in nearest]
        assert [n.similarity for n in query.trained] == pytest.approx([float(similarity[p]) for p in nearest], abs=1e-4)
        assert {n.is_right for n in (*query.trained, *query.untrained)} == {None}


def test_a_page_without_labels_shows_neighbors_and_says_that_nothing_judges_them(run: Path, unlabeled: Path) -> None:
    change(run, eval={"shards": str(unlabeled)})
    page = write(run, num_samples=2)
    assert "Held-out samples, evenly spread over the set" in page.text
    assert "No labels tell which are right: compare by eye." in page.text
    assert "✓" not in page.text
    assert "✗" not in page.text
    assert page.html.count('<div class="hit"') == 2 * 6 * 2


def test_commands_in_messages_are_code(run: Path, page: Page) -> None:
    assert "its features have not been computed: <code>moco-fast report RUN --map</code> does it" in page.html
    assert "`" not in page.text
    warning = {"step": 3, "about": "lag", "warning": "`moco-fast runs '<i>'` says more; one ` stays"}
    (run / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    error = "no number; `moco-fast replay RUN` & look"
    (run / "outcome.json").write_text(json.dumps({"outcome": "failed", "error": error}))
    html = write(run, num_samples=1).html
    assert "<code>moco-fast runs &#x27;&lt;i&gt;&#x27;</code> says more; one ` stays." in html
    assert "no number; <code>moco-fast replay RUN</code> &amp; look; the same command" in html


def test_warnings_are_on_the_page_and_markup_in_them_is_text(run: Path, page: Page) -> None:
    assert "What it warned of" not in page.text
    lines = [
        {"step": 0, "about": "dictionary", "warning": "the dictionary of 9 keys exceeds the set"},
        {"step": 1200, "about": "collapse", "warning": "features have <b>collapsed</b>"},
        {"step": 1201, "about": "cut"},
    ]
    (run / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    text = write(run, num_samples=1).text
    assert "What it warned of at the start The dictionary of 9 keys exceeds the set." in text
    assert "step 1,200 Features have <b>collapsed</b>." in text
    assert "1,201" not in text


def test_right_and_wrong_are_marked_and_counted(page: Page) -> None:
    marks = re.findall(r'class="hit (right|wrong)"', page.html)
    assert len(marks) == 4 * 6 * 2
    counted = re.search(r"Right neighbors: (\d+) of 24 after training, (\d+) of 24 before", page.text)
    assert counted
    assert sum(map(int, counted.groups())) == marks.count("right")
    assert page.text.count("✓") == marks.count("right")


def test_a_run_that_still_goes_on(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "running"}))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    write_beat(run, Beat.now(step=25, step_time=time.time()))
    with locked(run / "lock", holder="the run"):
        page = write(run, num_samples=2)
    assert "Running: 20 steps" in page.text
    assert f"so far, process {os.getpid()} on {os.uname().nodename}." in page.text
    assert "Continue this run" not in page.text
    assert "moco-fast export" in page.text


def test_a_run_that_was_killed(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "running"}))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 50, "l\n\0\0\0\n7\n[]\n{"step": "50"}\n{"loss": 1}\n{"step": 50}\n')
    page = write(run, num_samples=2)
    assert "Ended without a word, as after a kill or on a full disk, after 40 steps" in page.text
    assert "the same command continues from step 40." in page.text
    assert "Continue this run" in page.text
    shutil.rmtree(run / "checkpoints")
    page = write(run, num_samples=2)
    assert "the same command begins again." in page.text
    assert "Begin this run again" in page.text
    for command in ("moco-fast eval", "moco-fast export"):
        assert command not in page.text


def test_a_damaged_file_names_itself(run: Path) -> None:
    for name in ("environment.json", "config.json"):
        for content in (b"", b"\0\0\0", b"[]", b"\xff"):
            (run / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                read_run(run)
    for content in ("{}", '{"data": 3}', '{"method": {"name": 7}}'):
        (run / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json holds no configuration that this version knows"):
            read_run(run)


def test_a_run_that_has_logged_nothing_yet(run: Path) -> None:
    for name in ("metrics.jsonl", "environment.json", "outcome.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    page = write(run, num_samples=2)
    assert "Nothing has been measured yet" in page.text
    assert "holds no checkpoint" in page.text
    assert "No evaluation: none has been done yet" in page.text
    assert page.open == []


def test_a_run_without_evaluation(run: Path) -> None:
    change(run, eval={"shards": None})
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "knn" not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = write(run, num_samples=2)
    assert "Training samples, evenly spread over the set, and the other training samples" in page.text
    assert len(page.images["sample 0"]) == 1  # It is no neighbor of itself.
    assert "Loss over training steps" in page.html
    assert "moco-fast eval" not in page.text
    # With a health that was measured, that is compared.
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 40, "epoch": 4, "samples": 1280, "time_s": 9, "health/rankme": 7.0}))
    assert f"moco-fast eval health --encoder {run} --beside untrained" in write(run, num_samples=1).text


def test_shards_that_have_moved_cost_the_pictures_only(run: Path, tmp_path: Path) -> None:
    change(run, data={"shards": str(tmp_path / "moved")})
    page = write(run, num_samples=2)
    assert "The views cannot be shown" in page.text
    assert "65.0%" in page.text


def test_a_failed_run_tells_why_and_markup_in_it_is_text(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "failed", "error": "loss is <b>nan</b> & worse"}))
    page = write(run, num_samples=2)
    assert "Failed after 40 steps" in page.text
    assert "loss is <b>nan</b> & worse" in page.text


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run's folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_configuration_lists_every_option_and_marks_what_differs(finished_run: Path) -> None:
    record = read_run(finished_run)
    assert record.recipe == "cifar10"
    options = {option.name: option for option in configuration_table(record)}
    assert options["--method.dim"].value == "16"
    assert options["--method.dim"].recipe == "128"
    assert options["--method.momentum"].recipe is not None
    assert options["--views.query.flip-p"].recipe is None
    sections = {name: value for name, value in to_dict(record.config).items() if name != "recipe"}
    assert len(options) == len(list(leaves(sections)))


def leaves(values: Any) -> Any:
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else (value,)


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("/venv/python -u -m moco_fast.train moco_v2 --run.out moco-v1", "moco-v2"),
        ("/venv/python -m moco_fast.train memory-bank --data.shards cifar10", "memory-bank"),
        # Started by other means: the nearest.
        ("/venv/python compare.py --only moco-v1", "moco-v2"),
        ("/venv/python -m moco_fast.train", "moco-v2"),
    ],
)
def test_no_other_word_of_the_command_is_taken_for_the_recipe(run: Path, words: str, recipe: str) -> None:
    (run / "environment.json").write_text(json.dumps({"command": words.split()}))
    assert read_run(run).recipe == recipe


def test_the_recipe_of_a_run_without_environment_is_the_nearest(run: Path) -> None:
    (run / "environment.json").unlink()
    for name, (_, preset) in PRESETS.items():
        config = to_dict(preset)
        config["data"]["shards"] = "somewhere"
        config["optim"]["lr"] = 0.5
        (run / "config.json").write_text(json.dumps(config))
        record = read_run(run)
        assert (record.recipe, record.command) == (name, "")


@pytest.mark.parametrize(
    ("method", "choices", "loss"),
    [
        (MomentumContrast(queue_size=4096), 4097, math.log(4097)),
        (MomentumContrast(queue_size=4096, symmetric=True), 4097, 2 * math.log(4097)),
        (MomentumContrastV3(temperature=0.5), 32, 2 * math.log(32)),
        (EndToEnd(), 32, math.log(32)),
        (MemoryBank(num_negatives=10), 11, math.log(11)),
    ],
)
def test_guessing_is_the_loss_of_one_who_cannot_tell(method: Method, choices: int, loss: float) -> None:
    chart = method.charts(32)[0]
    assert chart.level is not None
    assert (chart.level.label, chart.level.value) == ("guessing", pytest.approx(loss))
    assert f"among {choices:,}." in chart.caption


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_that_a_method_watches_has_its_chart(name: str) -> None:
    method = PRESETS[name][1].method
    shown = [number for chart in method.charts(32) for number in chart.curves]
    assert sorted(shown) == sorted(("loss", *method.watched))
    assert all(chart.about in ("learning", "health") and chart.caption.endswith(".") for chart in method.charts(32))


@pytest.mark.parametrize("name", ["moco-v3-resnet50", "simsiam", "memory-bank", "moco-v2-multicrop"])
def test_a_report_shows_what_the_method_watches_and_nothing_else(name: str, run: Path) -> None:
    config = dataclasses.replace(read_run(run).config, method=PRESETS[name][1].method)
    num_small = 2 if config.method.name == "momentum-contrast" else 0
    if num_small:
        views = dataclasses.replace(config.views, num_small=num_small, small_size=16)
        config = dataclasses.replace(config, views=views)
    watched = config.method.watched
    line = dict.fromkeys(("loss", *watched, "lr", "samples_per_s", "data_wait_share"), 0.25)
    lines = [{"step": step, "epoch": 1.0, "samples": 32, "time_s": 1.0} | line for step in (10, 20)]
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    record = read_run(run)
    assert record.config == config
    page = write_report(run, num_samples=1).read_text()
    for chart in config.method.charts(32, num_small):
        assert f"{chart.title} over training steps" in page
    for kind, num_views in (("query", 1), ("key", config.method.num_views - 1), ("small", num_small)):
        assert page.count(f'alt="{kind} view"') == page.count(f'<rect class="of-{kind}"') == num_views
    assert ("small views" in page) == bool(num_small)
    for title in ("Contrastive accuracy", "Similarities"):
        assert (f"{title} over training steps" in page) == ("accuracy" in watched)
    assert config.method.note(lines[-1]) in page


def test_the_headline_of_a_stopped_run(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "stopped"}))
    assert headline(read_run(run)).startswith("Stopped and saved after 40 steps")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_out_keeps_ends_bounds_and_short_curves(values: list[float]) -> None:
    steps, thinned = thin_out(range(len(values)), values)
    assert len(steps) == len(thinned) == min(len(values), 400)
    assert np.all(np.diff(steps) > 0)
    assert min(values) - 1e-6 <= thinned.min() <= thinned.max() <= max(values) + 1e-6
    if len(values) <= 400:
        assert thinned.tolist() == values


def test_a_figure_takes_its_colors_from_the_page_and_stays_small() -> None:
    curves = [Curve(steps=range(100_000), values=[0.0] * 100_000, label="a"), Curve(steps=[0, 9], values=[1, 2])]
    svg = draw_curves(curves, alt="both", level=Level(value=3, label="<level>"), from_zero=True)
    for variable in ("var(--query)", "var(--key)", "var(--muted)", "var(--line)"):
        assert variable in svg
    assert not re.search(r"#0\d0\d0\d", svg)
    assert "#ffffff" not in svg
    assert "&lt;level&gt;" in svg
    assert len(svg) < 40_000
    assert svg == draw_curves(curves, alt="both", level=Level(value=3, label="<level>"), from_zero=True)


def test_a_chart_of_zeros_has_a_scale_of_its_own() -> None:
    svg = draw_curves([Curve(steps=[0, 50, 100], values=[0.0] * 3)], alt="zeros", percent=True, from_zero=True)
    assert "100%" in svg
    assert "e-" not in re.sub(r'="[^"]*"', "", svg)


@pytest.mark.parametrize(
    ("places", "ticks"),
    [([0.0, 0.25, 0.8], ["0.15", "0.75"]), ([0, 7], ["2", "4"]), ([0, 12_000], ["5,000", "10,000"])],
)
def test_the_ticks_of_shares_are_shares_and_those_of_steps_are_whole(places: list[float], ticks: list[str]) -> None:
    svg = draw_curves([Curve(steps=places, values=[500.5 + place for place in range(len(places))])], alt="ticks")
    written = re.findall(r">([^<>]+)</text>", svg)
    assert set(ticks) <= set(written)
    assert len(set(written)) == len(written)


def test_what_was_measured_afterwards_is_on_the_page(run: Path) -> None:
    assert "What is it worth?" not in write_report(run, device=torch.device("cpu"), num_samples=1).read_text()
    (run / "evaluations").mkdir()
    (run / "evaluations" / "broken.json").write_text("{")
    points = ((0.0, 0.25), (1.0, 0.5))
    curve = FigureCurve(title="Error on images", caption="Share <of> images.", over="severity", points=points)
    figure = Figure(value=0.625, interval=(0.5, 0.75), title="linear <top-1>")
    known = {
        "settings": {},
        "data": {},
        "view": {},
        "precision": "fp32",
        "device": "cpu",
        "world_size": 1,
        "seeds": (0,),
    }
    for number, value in enumerate((0.1, 0.625)):
        result = Result(
            task="linear",
            protocol="fast",
            encoder={"name": "the run", "digest": "d"},
            figures={"top1": dataclasses.replace(figure, value=value)},
            curves={"drawn": curve, "kept": dataclasses.replace(curve, title="Of one kind", in_report=False)},
            **known,
        )
        write_results(run / "evaluations" / f"{9 - number}.json", [result])
        os.utime(run / "evaluations" / f"{9 - number}.json", (number, number))
    page = Page(write_report(run, device=torch.device("cpu"), num_samples=1).read_text())
    assert "What is it worth?" in page.text
    assert "linear <top-1> 62.50% (50.00% to 75.00%)" in page.text
    assert "10.00%" not in page.text
    assert page.text.count("Error on images") == 1
    assert "Share <of> images." in page.text
    assert "Of one kind" not in page.text
