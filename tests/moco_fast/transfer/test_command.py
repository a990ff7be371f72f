import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moco_fast.cli import main
from moco_fast.evaluation.published import BENCHMARKS, PUBLISHED, beside_published
from moco_fast.evaluation.result import read_results
from moco_fast.transfer.compare import as_tables, open_inits
from moco_fast.transfer.presets import PRESETS, settled
from tests.moco_fast.transfer.coco_shapes import write_coco
from tests.moco_fast.transfer.lvis_shapes import write_lvis
from tests.moco_fast.transfer.pixel_shapes import write_city_instances
from tests.moco_fast.transfer.shapes import write_year

PLAIN = (
    *("--batch-size", "2", "--group", "1", "--steps", "2", "--sides", "48", "--test-side", "48", "--longest", "72"),
    *("--regions", "4", "--precise-batches", "1", "--threads", "1", "--device", "cpu"),
)
SMALL = (
    *PLAIN,
    *("--anchor-sizes", "16", "32"),
    *("--train", "VOC2007/trainval", "--test", "VOC2007/test"),
)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    write_year(tmp_path / "VOCdevkit" / "VOC2007", {"trainval": 6, "test": 2})
    return tmp_path / "VOCdevkit"


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", {"train2017": 6, "val2017": 1})


def transfer(devkit: Path, out: Path, *words: str, init=("random",), network: str = "resnet18_quarter") -> int:
    given = ["--data", str(devkit), "--init", *init, "--network", network, "--out", str(out)]
    return main(["transfer", "detect", *given, *SMALL, *words])


def test_initial_weights_are_compared_in_a_table_with_differences_and_spread(
    devkit, finished_run, tmp_path, capsys
) -> None:
    out = tmp_path / "out"
    assert transfer(devkit, out, "--seeds", "2", init=("random", str(finished_run))) == 0
    printed = capsys.readouterr().out
    assert "detect voc-c4  AP50" in printed
    assert f"difference from random  {finished_run}" in printed
    first, second = read_results(out / "results.json")
    assert [first.encoder["name"], second.step] == ["random (resnet18_quarter)", 40]
    assert list(first.figures) == ["AP50", "AP", "AP75"]
    assert [len(figure.by_seed) for figure in second.figures.values()] == [2, 2, 2]
    assert [step for step, _ in second.curves["loss"].points] == [1, 2]
    assert first.data["train"]["num_samples"] == 6
    assert len(list((out / "trained").iterdir())) == 4
    rows = list(csv.DictReader((out / "per-class.csv").read_text().splitlines()))
    assert {row["init"] for row in rows} == {first.encoder["name"], second.encoder["name"]}
    assert {row["seed"] for row in rows} == {"0", "1"}
    # The same command finds all of it.
    before = {path: path.stat().st_mtime_ns for path in (out / "trained").iterdir()}
    assert transfer(devkit, out, "--seeds", "2", init=("random", str(finished_run))) == 0
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in (out / "trained").iterdir()} == before


def test_differences_are_those_of_each_seed(devkit, tmp_path) -> None:
    transfer(devkit, tmp_path / "out", "--seeds", "2")
    [result] = read_results(tmp_path / "out" / "results.json")
    figures = [{"AP50": replace(result.figures["AP50"], by_seed=seeds)} for seeds in ((0.5, 0.6), (0.55, 0.66))]
    results = [replace(result, figures=figures[0]), replace(result, figures=figures[1], encoder={"name": "b"})]
    # Differences 5 and 6: mean 5.5, standard error 0.5, Student's t 12.706 for one degree of freedom.
    assert as_tables(results).splitlines()[-1].split() == ["AP50", "+5.50", "(-0.85", "to", "+11.85)"]


@pytest.mark.slow
def test_the_preset_with_a_resnet_50_takes_two_steps_and_is_tested(devkit, tmp_path) -> None:
    assert transfer(devkit, tmp_path / "out", network="resnet50") == 0
    [result] = read_results(tmp_path / "out" / "results.json")
    assert result.encoder["name"] == "random (resnet50)"
    assert all(loss > 0 for _, loss in result.curves["loss"].points)
    weights = next((tmp_path / "out" / "trained").iterdir())
    assert weights.stat().st_size > 4 * 33e6


def test_dilated_c5_takes_two_steps_and_is_tested(devkit, tmp_path) -> None:
    assert transfer(devkit, tmp_path / "out", "--preset", "voc-c5") == 0
    [result] = read_results(tmp_path / "out" / "results.json")
    assert (result.protocol, list(result.figures)) == ("voc-c5", ["AP50", "AP", "AP75"])


@pytest.mark.parametrize("preset", ["coco-c4-1x", "coco-fpn-1x"])
def test_presets_of_coco_take_two_steps_and_measure_boxes_and_masks(preset, coco_folder, tmp_path, capsys) -> None:
    given = ["--data", str(coco_folder), "--init", "random", "--network", "resnet18_quarter"]
    given += ["--preset", preset, "--out", str(tmp_path / "out")]
    assert main(["transfer", "detect", *given, *PLAIN]) == 0
    assert f"detect {preset}  mask AP75" in capsys.readouterr().out
    [result] = read_results(tmp_path / "out" / "results.json")
    assert list(result.figures) == [f"{kind} {name}" for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")]
    rows = list(csv.DictReader((tmp_path / "out" / "per-class.csv").read_text().splitlines()))
    assert {row["of"] for row in rows} == {"box", "mask"}
    assert {row["class"] for row in rows} <= {"bus", "car", "cat"}


def test_a_set_of_boxes_alone_is_trained_and_tested_without_masks(tmp_path, capsys) -> None:
    data = write_coco(tmp_path / "coco", {"train2017": 4, "val2017": 1})
    for path in (data / "annotations").iterdir():
        told = json.loads(path.read_text())
        for each in told["annotations"]:
            each["segmentation"] = []
        path.write_text(json.dumps(told))
    given = ["--data", str(data), "--init", "random", "--network", "resnet18_quarter", "--preset", "coco-c4-1x"]
    given += ["--out", str(tmp_path / "out"), *PLAIN]
    assert main(["transfer", "detect", *given, "--masks", "True"]) == 2
    assert "--masks True, but no object" in capsys.readouterr().err
    assert main(["transfer", "detect", *given]) == 0
    assert "boxes alone are trained and tested" in capsys.readouterr().err
    [result] = read_results(tmp_path / "out" / "results.json")
    assert list(result.figures) == [f"box {name}" for name in ("AP", "AP50", "AP75")]
    assert result.settings["masks"] is False
    assert "without masks" in " ".join(result.notes)


def test_without_what_measures_coco_its_presets_say_what_to_install(coco_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("moco_fast.transfer.coco.find_spec", lambda name: None)
    given = ["--data", str(coco_folder), "--init", "random", "--preset", "coco-fpn-1x", "--out", str(tmp_path / "out")]
    assert main(["transfer", "detect", *given]) == 2
    assert "pip install 'moco-fast[transfer]'" in capsys.readouterr().err


def test_presets_in_one_folder_keep_their_results_and_share_a_page(devkit, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    for preset in ("voc-c4", "voc-c5", "voc-c4"):
        assert transfer(devkit, out, "--preset", preset) == 0
    assert [result.protocol for result in read_results(out / "results.json")] == ["voc-c5", "voc-c4"]
    rows = list(csv.DictReader((out / "per-class.csv").read_text().splitlines()))
    assert {row["preset"] for row in rows} == {"voc-c4", "voc-c5"}
    assert {row["training"] for row in rows} == {path.stem for path in (out / "trained").iterdir()}
    assert {path.stem for path in (out / "pictures").iterdir()} == {row["training"] for row in rows}
    page = (out / "report.html").read_text()
    for words in (
        "detect voc-c4",
        "detect voc-c5",
        "Training loss",
        "Best and worst",
        "VOC2007/test_0001",
        "classes</summary>",
    ):
        assert words in page
    # Again from what is kept, wherever the images are now.
    devkit.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "again.html")]) == 0
    assert "again.html" in capsys.readouterr().out

    def plain(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("<footer>")]

    assert plain((tmp_path / "again.html").read_text()) == plain(page)
    # Without its pictures a training says so.
    for path in (out / "pictures").iterdir():
        path.unlink()
    assert main(["report", str(out)]) == 0
    assert "tested before pictures were kept" in (out / "report.html").read_text()


def test_results_that_cannot_be_read_are_refused_before_work(devkit, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{")
    assert transfer(devkit, tmp_path / "out") == 2
    assert "results.json is not a file of results" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trainings").exists()


def test_what_is_left_out_is_noted_and_refused_above_a_share(devkit, tmp_path, capsys) -> None:
    (devkit / "VOC2007" / "Annotations" / "trainval_0002.xml").unlink()
    assert transfer(devkit, tmp_path / "out", "--max-malformed", "0.1") == 2
    assert "1 of 6 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WRONG = {
    "--max-malformed is 2.0": ("--max-malformed", "2"),
    "--steps is 0": ("--steps", "0"),
    "--sides is -1": ("--sides", "-1"),
    "--repeat-threshold is -1": ("--repeat-threshold", "-1"),
    "not a multiple of --group 3": ("--group", "3"),
    "--init random random: give one or more, each once": ("--init", "random", "random"),
    "no VOC2012/ImageSets/Main/val.txt": ("--test", "VOC2012/val"),
    "torchvision has no weights of resnet18_quarter": ("--init", "supervised"),
    "are not on this machine": ("--init", "supervised", "--network", "resnet50"),
    "does not exist: give a run's folder": ("--init", "nowhere"),
    "--precision fp16 needs a GPU": ("--precision", "fp16"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_cannot_be_is_refused_with_a_way_out(devkit, tmp_path, capsys, reason, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert transfer(devkit, tmp_path / "out", *WRONG[reason]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_another_batch_size_takes_learning_rate_and_steps_along() -> None:
    preset = PRESETS["voc-c4"]
    small = settled(preset, batch_size=4)
    assert (small.lr, small.steps, small.drops) == (0.005, 96_000, preset.drops)
    assert (small.warmup_steps, settled(preset, steps=10).warmup_steps) == (400, 100)
    assert settled(preset, {"lr": 1.0}, batch_size=4, steps=10).lr == 1.0
    assert settled(preset) == preset


def test_presets_are_shown_with_published_figures(capsys) -> None:
    assert main(["transfer", "presets"]) == 0
    shown = capsys.readouterr().out
    assert "detect --preset voc-c4: Faster R-CNN R50-C4" in shown
    assert "segment --preset voc-semantic: FCN" in shown
    assert "steps: 24000" in shown
    assert "MoCo v1, 200 epochs  AP75    62.6" in shown


def test_a_result_of_the_benchmark_stands_beside_the_published_one(devkit, tmp_path) -> None:
    transfer(devkit, tmp_path / "out")
    path = tmp_path / "out" / "results.json"
    told = json.loads(path.read_text())
    for split, number in (("train", 16_551), ("test", 4_952)):
        told["results"][0]["data"][split] |= {"num_samples": number, "num_classes": 20}
    path.write_text(json.dumps(told))
    shown = beside_published(read_results(path))
    assert "VOC07+12   detect voc-c4  AP50" in shown
    assert "measured here" in shown
    assert "82.4" in shown
    assert "note: detect voc-c4 of random (resnet18_quarter) has other settings than the published" in shown
    assert "steps 2 in place of 24000; " in shown
    assert "test-side 48 in place of 800" in shown
    whole = asdict(PRESETS["voc-c4"])
    told["results"][0]["settings"] = whole
    path.write_text(json.dumps(told))
    assert "note:" not in beside_published(read_results(path))
    told["results"][0]["settings"]["optimizer"] = "adamw"
    path.write_text(json.dumps(told))
    shown = beside_published(read_results(path))
    assert "detect voc-c4 adamw" in shown
    assert "82.4" not in shown


def test_random_and_supervised_weights_are_of_the_network_that_they_are_compared_with(finished_run) -> None:
    random, run = open_inits(["random", str(finished_run)], network=None)
    starts = [random.start(seed) for seed in (0, 1, 0)]
    assert starts[0].digest == starts[2].digest != starts[1].digest
    assert random.encoder.backbone is not run.encoder.backbone
    assert random.encoder.state_dict().keys() == run.encoder.state_dict().keys()
    # The pixels of the run, too.
    assert torch.equal(random.encoder.pixel_scale, run.encoder.pixel_scale)


def test_another_network_than_that_of_the_encoder_is_refused(finished_run) -> None:
    with pytest.raises(ValueError, match=r"--network resnet50, but .* is a resnet18_quarter"):
        open_inits(["random", str(finished_run)], network="resnet50")


def test_a_test_on_images_that_are_trained_on_is_noted(devkit, tmp_path, capsys) -> None:
    assert transfer(devkit, tmp_path / "out", "--test", "VOC2007/trainval") == 0
    note = "6 images of the test set are trained on, too"
    assert note in capsys.readouterr().err
    [result] = read_results(tmp_path / "out" / "results.json")
    assert [each for each in result.notes if note in each]


def test_what_a_training_found_is_refused_where_it_is_something_else(devkit, tmp_path, capsys) -> None:
    assert transfer(devkit, tmp_path / "out") == 0
    [path] = (tmp_path / "out" / "trainings").glob("*.json")
    path.write_text("{}")
    assert transfer(devkit, tmp_path / "out") == 2
    assert f"{path} is not what a training found" in capsys.readouterr().err


def test_lvis_takes_two_steps_and_has_figures_of_frequencies(tmp_path, capsys) -> None:
    write_lvis(tmp_path / "lvis", {"train": 6, "val": 2})
    given = ["--data", str(tmp_path / "lvis"), "--init", "random", "--network", "resnet18_quarter"]
    given += ["--preset", "lvis-fpn-2x", "--out", str(tmp_path / "out"), "--detections", "10"]
    assert main(["transfer", "detect", *given, *PLAIN]) == 0
    assert "detect lvis-fpn-2x  mask AP75" in capsys.readouterr().out
    [result] = read_results(tmp_path / "out" / "results.json")
    assert {"box AP", "mask AP", "mask AP50", "mask AP75"} <= set(result.figures)
    rows = list(csv.DictReader((tmp_path / "out" / "per-class.csv").read_text().splitlines()))
    frequencies = {row["class"]: row["frequency"] for row in rows}
    assert frequencies.items() <= {"bus": "rare", "car": "common", "cat": "frequent"}.items()
    groups = {"rare": "APr", "common": "APc", "frequent": "APf"}
    assert {name for name in result.figures if name[-1] in "rcf"} == {
        f"{kind} {groups[each]}" for kind in ("box", "mask") for each in frequencies.values()
    }
    assert result.settings["repeat_threshold"] == 0.001


def test_instances_of_cityscapes_take_two_steps_and_have_the_benchmarks_figures(tmp_path) -> None:
    write_city_instances(tmp_path / "city", {"train": 5, "val": 1})
    given = ["--data", str(tmp_path / "city"), "--init", "random", "--network", "resnet18_quarter"]
    given += ["--preset", "cityscapes-instance", "--out", str(tmp_path / "out"), "--detections", "10"]
    assert main(["transfer", "detect", *given, *PLAIN]) == 0
    [result] = read_results(tmp_path / "out" / "results.json")
    assert list(result.figures) == ["AP", "AP50"]
    rows = list(csv.DictReader((tmp_path / "out" / "per-class.csv").read_text().splitlines()))
    assert {row["class"] for row in rows} <= {"person", "car"}


PUBLISHED_SETS = {"lvis-fpn-2x": (1_230, 5_000, "37.8"), "cityscapes-instance": (8, 500, "59.6")}


@pytest.mark.parametrize("preset", PUBLISHED_SETS)
def test_each_benchmark_has_its_published_rows(preset, capsys) -> None:
    num_classes, num_test, value = PUBLISHED_SETS[preset]
    [name] = [name for name, each in BENCHMARKS.items() if (each.num_classes, each.num_test) == (num_classes, num_test)]
    rows = [each for each in PUBLISHED if (each.benchmark, each.task) == (name, f"detect {preset}")]
    assert rows
    assert main(["transfer", "presets"]) == 0
    shown = capsys.readouterr().out.partition(f"detect --preset {preset}:")[2]
    assert any(value in line and "supervised" in line for line in shown.splitlines())
