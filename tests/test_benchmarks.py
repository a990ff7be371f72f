"""What the benchmarks share, and that the README says what they found."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.scripts import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def alternating():
    return load("alternating")


@pytest.fixture(scope="module")
def run_all():
    return load("run_all")


@pytest.mark.parametrize(
    ("less_is_better", "goal", "ratio", "holds"),
    [(False, 2.0, 2.0, True), (True, 2.0, 0.5, False), (True, None, 0.5, None)],
)
def test_a_ratio_says_how_many_times_better(alternating, less_is_better, goal, ratio, holds):
    options = {"unit": "s", "less_is_better": less_is_better, "goal": goal}
    claim = alternating.compare("a / b", [2.0, 6.0, 4.0], [1.0, 2.0, 4.0], **options)
    assert (claim.ours, claim.theirs, claim.ratio, claim.holds) == (4.0, 2.0, ratio, holds)
    assert claim.lowest <= claim.ratio <= claim.highest
    shown = alternating.claims_table([claim])
    assert f"**{ratio:.2f}** ({claim.lowest:.2f} to {claim.highest:.2f})" in shown
    assert ("holds" in shown, "MISSED" in shown) == (holds is True, holds is False)


def test_alternatives_take_turns(alternating):
    import torch

    calls = []
    made = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = alternating.alternate(made, rounds=3, device=torch.device("cpu"), warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_benchmarks_become_pages_claims_and_the_readmes_table(run_all, tmp_path, capsys):
    readme, results, build = tmp_path / "README.md", tmp_path / "results", tmp_path / "build"
    results.mkdir()
    build.mkdir()
    readme.write_text(f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter\n")
    small = "--shards 100 --samples 100000 --batch-size 64 --dali-samples 1000"
    (results / "order.md").write_text(f"the last page\n\n{run_all.BY_HAND}\n\nwhat it means\n")
    good = run_all.Benchmark(name="order", words=small, limit_s=60)
    assert run_all.run_all([good], {}, results, build) in (True, False)
    claims = run_all.read_claims(results / "claims.json")
    run_all.write_readme(readme, claims)
    assert readme.read_text() == f"before\n{run_all.BEGIN}\n{run_all.readme_table(claims)}\n{run_all.END}\nafter\n"
    assert claims["order"][0].claim in readme.read_text()
    page = (results / "order.md").read_text()
    assert small in page
    assert "the last page" not in page
    assert page.endswith(f"\n\n{run_all.BY_HAND}\n\nwhat it means\n")

    kept = (results / "claims.json").read_text()
    wrong = run_all.Benchmark(name="order", words="--no-such-option", limit_s=60)
    assert not run_all.run_all([wrong], {}, results, build)
    slow = run_all.Benchmark(name="order", words=small, limit_s=0.01)
    assert not run_all.run_all([slow], {}, results, build)
    without_peers = run_all.Benchmark(name="order", words="", limit_s=60, needs=("no_such_peer",))
    assert run_all.run_all([without_peers], {}, results, build)
    said = capsys.readouterr().out
    assert "order: FAILED" in said
    assert "order is left out: it needs no_such_peer" in said
    assert (results / "claims.json").read_text() == kept


def test_the_readme_shows_what_the_benchmarks_found(run_all):
    claims = run_all.read_claims(ROOT / "benchmarks" / "results" / "claims.json")
    shown = (ROOT / "README.md").read_text().split(run_all.BEGIN)[1].split(run_all.END)[0]
    assert shown.strip() == run_all.readme_table(claims).strip(), "make bench writes the table"


def test_all_benchmarks_fit_into_a_quarter_of_an_hour_and_the_longer_ones_into_what_is_said(run_all):
    assert sum(each.limit_s for each in run_all.BENCHMARKS) <= 900
    assert sum(each.limit_s for each in run_all.MORE) <= 5400
    for each in (*run_all.BENCHMARKS, *run_all.MORE):
        source = (ROOT / "benchmarks" / f"{each.script or each.name}.py").read_text()
        if "step_options" in source:
            source += (ROOT / "benchmarks" / "step.py").read_text()
        further = [("--json", each.claims), ("--plot", each.plot), ("--python", each.interpreters)]
        options = [option for option, is_used in further if is_used]
        for option in [*re.findall(r"--[\w-]+", each.words), *options]:
            assert f'"{option}"' in source, (each.name, option)


def test_every_page_of_results_has_a_command_that_makes_it(run_all):
    made = {each.name for each in (*run_all.BENCHMARKS, *run_all.MORE, run_all.PEERS)}
    pages = {path.stem: path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert set(pages) == made | set(run_all.ELSEWHERE)
    assert not made & set(run_all.ELSEWHERE)
    for name, scripts in run_all.ELSEWHERE.items():
        for script in scripts:
            assert (ROOT / "benchmarks" / f"{script}.py").is_file()
            assert f"benchmarks/{script}.py" in pages[name]


def test_results_hold_no_path_of_this_machine(run_all):
    pages = list((ROOT / "benchmarks" / "results").glob("*.md"))
    assert pages
    for page in pages:
        assert str(ROOT) not in page.read_text()
    file = ROOT / "benchmarks" / "results" / "claims.json"
    assert all(of_one for of_one in json.loads(file.read_text()).values())


def test_a_stored_size_is_held_to_its_goal():
    stored = load("stored_size")
    rates = {"full": [100.0, 100.0], "320": [150.0, 150.0], "256": [190.0, 190.0]}
    costs = {name: [2.0, 2.0] for name in rates}
    claims = stored.claims_of(rates, costs, {"full": 110e3, "320": 44e3, "256": 27.5e3})
    assert [(each.ratio, each.goal, each.holds) for each in claims if each.claim.endswith(": loader")] == [
        (1.5, None, None),
        (1.9, 1.8, True),
    ]
    assert [each.ratio for each in claims if each.claim.endswith(": bytes")] == [2.5, 4.0]


def test_a_stored_sizes_accuracy_is_held_against_the_same_seed_at_full_size():
    stored = load("stored_accuracy")

    def row(side, seed, trained, num_bytes):
        return stored.Row(side=side, seed=seed, trained=trained, untrained=0.4, num_bytes=num_bytes)

    rows = [row("full", 0, 0.6, 100), row("64", 0, 0.55, 40), row("full", 1, 0.7, 100), row("64", 1, 0.71, 40)]
    *_, full, small = stored.as_markdown(rows).splitlines()
    assert full == "| full | 100% | 65.0% (60.0%, 70.0%) | 40.0% |  |"
    assert small == "| 64 | 40% | 63.0% (55.0%, 71.0%) | 40.0% | -2.0 (-5.0 to +1.0) |"


def test_the_parts_of_views_are_what_each_stage_adds():
    parts = load("view_parts")
    ms = {"reading, checking": [0.1] * 3, "drawing": [0.25] * 3, "one by one": [4.0] * 3}
    ms |= {stage: [1.0 + number, 2.0 + number, 9.0 + 2 * number] for number, stage in enumerate(parts.STAGES)}
    found = parts.parts_of(ms)
    assert list(found) == ["reading, checking", "drawing", "entropy decoding", "rest of decoding", *parts.STAGES[2:]]
    assert list(found.values()) == [0.1, 0.25, 2.0, *[1.0] * 5]
    assert "| drawing | 0.25 | 3% |" in parts.as_table(found)
    assert [claim.theirs for claim in parts.claims_of(ms)] == [4.0, 3.0]


def test_views_without_the_later_stages_have_no_trace_of_them():
    import numpy as np

    from pipelines.config import ViewConfig, ViewsConfig
    from pipelines.plan.draw import draw_views
    from shards.sets.record import RECORD

    parts = load("view_parts")
    records = np.zeros(20, dtype=RECORD)
    records["width"], records["height"] = 50, 40
    recipe = ViewConfig(solarize_p=0.5)
    tables = draw_views(0, np.arange(20), records, views=ViewsConfig(query=recipe, key=recipe).specs, seed=1)
    for stage, flips, blurs, colors in (
        ("crop, resize", 0, 0, 0),
        ("flip", 1, 0, 0),
        ("blur", 1, 1, 0),
        ("colors", 1, 1, 1),
    ):
        for table in parts.up_to(stage, tables):
            assert (table.flip.any(), table.sigma.any()) == (flips, blurs)
            recolored = (table.factors != [1, 1, 1, 0]).any(), table.grayscale.any(), table.solarize.any()
            assert recolored == (colors, colors, colors)


@pytest.mark.parametrize("name", ["dino", "k4"])
def test_those_who_make_views_are_asked_for_the_same_ones(name):
    import torch
    from PIL import Image

    view_set = load("views").SETS[name]
    peer = next(make for who, make in view_set.peers.items() if who != "lightly")
    made = peer()(Image.new("RGB", (60, 40), (90, 120, 30)))
    assert [tuple(view.shape) for view in made] == [(3, spec.size, spec.size) for spec in view_set.ours]
    assert all(view.dtype == torch.float32 for view in made)


def test_dinos_authors_transforms_have_the_numbers_of_our_recipe():
    views = load("views")
    specs = views.SETS["dino"].ours
    for view, spec in zip(views.dino_transforms(), specs, strict=True):
        crop, flip, jitter, gray, blur, *rest = view.transforms
        recipe = spec.recipe
        assert (crop.size, crop.scale, flip.p) == ((spec.size, spec.size), recipe.crop_scale, recipe.flip_p)
        [colors] = jitter.transforms
        strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
        assert (colors.brightness, colors.contrast, colors.saturation) == tuple((1 - s, 1 + s) for s in strengths)
        assert (colors.hue, jitter.p, gray.p) == ((-recipe.hue, recipe.hue), recipe.jitter_p, recipe.grayscale_p)
        assert (blur.p, rest[0].p if len(rest) == 3 else 0.0) == (recipe.blur_p, recipe.solarize_p)


def test_the_torch_backend_s_rate_is_held_to_the_goal_of_views():
    rates = {"torch": [100.0, 120.0], "dali": [60.0, 60.0], "dino": [20.0, 30.0]}
    costs = {"torch": [4.0, 4.0], "dali": [6.0, 6.0], "dino": [24.0, 24.0]}
    claims = load("views").claims_of("all", rates, costs)
    found = [(each.claim, each.ratio, each.goal, each.holds) for each in claims]
    assert found == [
        ("all: torch backend / dino", 4.5, 4.0, True),
        ("all: torch backend / dino, processor time", 6.0, None, None),
        ("all: dali backend / dino", 2.5, None, None),
        ("all: dali backend / dino, processor time", 4.0, None, None),
    ]


def test_the_parts_of_a_start_are_read_from_what_a_run_says():
    from moco_fast.training.startup import StartUp

    start_up = StartUp({"launcher": 5.5, "imports": 3.5}, clock=lambda: 10.0)
    start_up.lap("sets and model")
    parts = load("startup").parts_of(start_up.describe("first step"))
    assert parts == {"launcher": 2.0, "imports": 3.5, "sets and model": 0.0}


def test_the_suite_s_page_has_the_table_and_what_was_compared():
    from moco_fast.evaluation.result import Figure, Result

    suite = load("suite")
    known = {
        "settings": {},
        "data": {},
        "view": {},
        "precision": "fp32",
        "device": "cpu",
        "world_size": 1,
        "seeds": (0,),
    }
    results = [
        Result(
            task="linear",
            protocol="fast",
            encoder={"name": name, "digest": name},
            figures={"top1": Figure(value=value, title="linear top-1")},
            time_s=time_s,
            **known,
        )
        for name, value, time_s in (("run", 0.5, 3.0), ("pixels", 0.25, 4.0))
    ]
    page = suite.as_markdown(results, 60.0, {"fast": 0.5, "v1": 0.505}, resumed=True)
    assert "| task | figure | run | pixels |\n| --- | --- | --- | --- |\n" in page
    assert "| linear fast | linear top-1 | 50.00% | 25.00% |" in page
    assert "took 60 s (its last start); of the first encoder: linear 3 s." in page
    assert "fast 50.00%, v1 50.50%" in page


def test_the_set_of_textured_shapes_has_the_same_objects_as_boxes_and_as_pixels(tmp_path):
    import numpy as np

    from moco_fast.transfer.pixel_sets import OPEN, read_pixel_sets, read_pixels
    from moco_fast.transfer.presets import SEGMENT_PRESETS
    from moco_fast.transfer.voc import find_parts, read_voc

    shapes = load("textured_shapes")
    shapes.write_set(tmp_path, num_train=6, num_test=3)
    boxes = [
        read_voc(find_parts([str(tmp_path)], [f"VOC2012/{part}"], option=""), class_names=shapes.CLASSES)
        for part in ("trainval", "test")
    ]
    pixels = read_pixel_sets([str(tmp_path)], SEGMENT_PRESETS["voc-semantic"])
    assert [len(each) for each in (*boxes, *pixels)] == [6, 3, 6, 3]
    assert not any(each.malformed for each in (*boxes, *pixels))
    for image, there in zip(boxes[0].images, pixels[0].images, strict=True):
        assert image.path == there.image
        classes = read_pixels(there, pixels[0].table)[1]
        covered = np.zeros_like(classes, dtype=bool)
        for box, number in zip(image.boxes.astype(int), image.classes, strict=True):
            part = np.s_[box[1] : box[3], box[0] : box[2]]
            assert set(np.unique(classes[part])) <= {0, number + 1, OPEN}
            assert (classes[part] != 0).any(axis=0).all()
            assert (classes[part] != 0).any(axis=1).all()
            covered[part] = True
        assert (classes[~covered] == 0).all()


@pytest.fixture(scope="module")
def loaders():
    """The registry, what times a contestant, and the script, as benchmarks/loader.py imports them."""
    return load("loaders.registry"), load("loaders.fresh"), load("loader")


def test_loaders_of_others_are_timed_and_every_run_is_kept(warm_python, loaders, tmp_path):
    names = ["pil", "tv2", "webdataset"]
    shards = load("photographs").photograph_shards(tmp_path, num=6, size=(160, 120))
    script = ROOT / "benchmarks" / "loader.py"
    small = f"--shards {shards} --size 32 --batch-size 4 --rounds 2 --seconds 0.01".split()
    done = warm_python.run(script, *small, "--only", *names, "--runs", tmp_path / "runs.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert list(kept["contestants"]) == names
    assert kept["data"]["photos"] == 6
    for name, each in kept["contestants"].items():
        described = loaders[0].CONTESTANTS[name].views
        assert each["views"] == described
        assert set(each["versions"]) == set(loaders[0].CONTESTANTS[name].packages)
        assert f"| {name} |" in done.stdout
        assert len(each["runs"]) == 2
        for one in each["runs"]:
            assert one["shape"] == [4, 3, 32, 32]
            assert one["dtype"] == ("float32" if "normalized float" in described else "uint8")
            assert one["samples_per_s"] > 0


def test_views_that_are_not_two_different_ones_are_refused(loaders):
    import torch

    _, fresh, _ = loaders
    options = load("loaders.base").Options("", 8, 2)
    views = torch.arange(2 * 2 * 3 * 8 * 8).reshape(2, 2, 3, 8, 8)
    assert fresh.check_views(list(views), options) == ("int64", (2, 3, 8, 8))
    for wrong in (views[:1], views[:, :1], views[:, :, :, :4], torch.stack([views[0], views[0]])):
        with pytest.raises(ValueError, match="two views"):
            fresh.check_views(list(wrong), options)


# From 3.12 on, Python warns of a fork where threads run; this one only fails, exits or sleeps.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_that_fails_dies_or_hangs_is_named(loaders, monkeypatch):
    import os
    import time

    _, fresh, _ = loaders
    options = load("loaders.base").Options("", 8, 2)

    def fail(*_):
        raise ValueError("no such set")

    for opens, said in (
        (fail, "pil: ValueError: no such set"),
        (lambda *_: os._exit(3), "pil: its process died"),
        (lambda *_: time.sleep(60), "pil: no figures after 0 s"),
    ):
        monkeypatch.setattr(fresh, "open_contestant", opens)
        limit_s = 0.2 if "no figures" in said else 60
        with pytest.raises(RuntimeError, match=said):
            fresh.measure_fresh("pil", options, 0.0, limit_s=limit_s)


def test_a_peer_that_fails_is_left_out_and_one_of_ours_is_not(loaders, monkeypatch, capsys):
    _, fresh, script = loaders
    figures = fresh.Figures(samples_per_s=2.0, cpu_ms=1.0, open_s=0.1, dtype="uint8", shape=(1,))

    def measured(name, *_):
        if name in failing:
            raise RuntimeError(f"{name}: no FFmpeg")
        return figures

    monkeypatch.setattr(script, "measure_fresh", measured)
    failing = {"spdl"}
    runs = script.take_turns(["torch", "spdl", "pil"], None, rounds=2, seconds=1)
    assert {name: len(each) for name, each in runs.items()} == {"torch": 2, "pil": 2}
    assert "spdl is left out: it failed (spdl: no FFmpeg)" in capsys.readouterr().out
    failing = {"torch"}
    with pytest.raises(RuntimeError, match="torch: no FFmpeg"):
        script.take_turns(["torch", "pil"], None, rounds=1, seconds=1)


def test_the_fastest_peer_is_what_the_torch_backend_is_held_to(loaders):
    rates = {"torch": [300.0, 330.0], "pil": [100.0, 100.0], "spdl": [400.0, 440.0]}
    first, second = loaders[2].peer_claims_of(rates, 224)
    assert first.claim == "two views at 224 pixels: torch backend / spdl, the fastest of 2 peers"
    assert (first.ratio, first.goal, first.holds) == (0.75, 1.0, False)
    assert (second.ratio, second.goal, second.holds) == (3.15, None, None)


def test_every_loader_has_its_file_and_its_packages_are_pinned(loaders):
    registry = loaders[0]
    files = {path.stem for path in (ROOT / "benchmarks" / "loaders").glob("*.py")}
    pinned = [
        re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
        for file in ("requirements.lock", "requirements-ffcv.lock", "benchmarks/requirements-loaders.txt")
    ]
    names = {name for each in pinned for name, _ in each}
    for name, contestant in registry.CONTESTANTS.items():
        module, function = contestant.opens.split(":")
        assert module in files, name
        assert f"def {function}(" in (ROOT / "benchmarks" / "loaders" / f"{module}.py").read_text()
        assert set(contestant.packages) <= names, name
        assert "uint8" in contestant.views or "float" in contestant.views
    assert dict(pinned[0]).keys() & dict(pinned[2]).keys() == {"antlr4-python3-runtime"}
    others = (ROOT / "benchmarks" / "requirements.txt").read_text()
    assert f"lightly=={dict(pinned[2])['lightly']}" in others


@pytest.fixture(scope="module")
def elasticity():
    return load("elasticity")


def test_what_an_epoch_lost_and_what_came_twice_is_counted(elasticity):
    whole = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    kept = [[3, 2], [4, 5], [6, 7], [8, 9]]
    as_it_was = elasticity.judge(whole, [whole, kept], [1])
    assert as_it_was == elasticity.Epoch(lost=0, twice=0, kept=4, later=4)
    # The second part went on from the first's batch, not behind it, and ended early.
    worse = elasticity.judge(whole, [whole, kept, [[2, 3], [6, 7]]], [1, 2])
    assert worse == elasticity.Epoch(lost=4, twice=2, kept=2, later=4)


def test_one_state_is_enough_where_a_loader_says_so(elasticity, tmp_path):
    for rank in range(4):
        (tmp_path / f"rank-{rank}").touch()
    taken = {name: elasticity.saved_state(name, tmp_path, 5).name for name in ("ours", "torchdata")}
    assert taken == {"ours": "rank-0", "torchdata": "rank-1"}


def test_ours_goes_on_with_other_ranks(elasticity, tmp_path, monkeypatch):
    loaders = load("elastic_loaders")
    ours = loaders.LOADERS["ours"]
    ours.write(tmp_path, 96, 24)

    def read(ranks, state, stop):
        found = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            opened = ours.open(tmp_path, loaders.Place(24))
            if state is not None:
                opened.load(state)
            batches = []
            for batch in opened.batches():
                batches.append(batch.tolist())
                saved = opened.save()
                if len(batches) == stop:
                    break
            found.append({"batches": batches})
        return elasticity.global_batches(found), saved

    first, state = read(2, None, 1)
    rest, _ = read(1, state, 3)
    whole, _ = read(1, None, 4)
    assert elasticity.judge(whole, [first, rest], [1]) == elasticity.Epoch(lost=0, twice=0, kept=3, later=3)


def test_a_packer_must_have_packed_everything_and_its_start_is_not_counted(monkeypatch, tmp_path):
    packers = load("packers")
    pictures = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path in pictures:
        path.write_bytes(load("elastic_loaders").photo())
    *_, pack, count = packers.PACKERS["webdataset"]
    pack([str(path) for path in pictures], tmp_path / "out", shrink=True)
    assert count(tmp_path / "out") == 3

    run = packers.run
    seconds = iter([(1.0, 2.0), (4.0, 9.0)] * 4)

    def timed(*_, **__):
        s, cpu = next(seconds)
        return {"s": s, "cpu": cpu, "mb": 1.0}

    monkeypatch.setattr(packers, "run", timed)
    pythons = {"ours": "python", "webdataset": "python"}
    found = packers.measure("copying files", ["a"], tmp_path, pythons, 2)
    assert list(found) == ["ours", "webdataset"]
    assert found["ours"] == {"s": [3.0, 3.0], "cpu": [7.0, 7.0], "mb": [1.0, 1.0], "start": [1.0, 1.0]}

    fewer = tmp_path / "fewer.py"
    fewer.write_text('print(\'{"s": 1, "num": 2, "mb": 3}\')')
    monkeypatch.setattr(packers, "__file__", str(fewer))
    with pytest.raises(RuntimeError, match="webdataset packed 2 of 3"):
        run(sys.executable, "webdataset", list(map(str, pictures)), tmp_path / "passes", shrink=False)


def test_training_stands_still_until_what_is_saved_was_copied():
    checkpoints = load("checkpoints")
    said = []

    class Training:
        def step(self, before_update=lambda: None):
            said.append("forward")
            before_update()
            said.append("update")

        def state(self, number):
            return number

    def save(number):
        said.append(f"save {number}")
        return checkpoints.Saving(finish=lambda: said.append("written"), copied=lambda: said.append("copied"))

    checkpoints.measure(Training(), save, 7, 3)
    step = ["forward", "update"]
    assert said == [*step, *step, "save 7", "forward", "copied", "update", "written"]
