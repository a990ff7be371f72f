import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from moco_fast.cli import main
from moco_fast.evaluation.base import FigureInfo, Measured, Outcome
from moco_fast.evaluation.published import BENCHMARKS, PUBLISHED, beside_published
from moco_fast.evaluation.result import (
    Figure,
    Result,
    aligned,
    as_text,
    read_results,
    summarize,
    table,
    wilson_interval,
    write_results,
)

IMAGENET = {"where": "shards/val", "digest": "d", "num_samples": 50_000, "num_classes": 1000}


def result(**changes: Any) -> Result:
    made = Result(
        task="linear",
        protocol="v2",
        settings={"epochs": 100},
        encoder={"name": "runs/first", "digest": "e"},
        data={"train": {**IMAGENET, "num_samples": 1_281_167}, "test": IMAGENET},
        view={"size": 224, "crop": 0.875, "backend": "auto"},
        precision="bf16",
        device="cuda:0",
        world_size=8,
        seeds=(0,),
        figures={
            "top1": Figure(
                value=0.681, interval=(0.677, 0.685), interval_of="samples", by_seed=(0.681,), title="top-1"
            ),
            "size": Figure(value=12.345678, title="size", unit="number"),
        },
    )
    return replace(made, **changes)


@given(hits=st.integers(0, 60), misses=st.integers(0, 60))
def test_the_interval_of_a_share_is_wilson_s(hits: int, misses: int) -> None:
    num = hits + misses
    if not num:
        return
    expected = binomtest(hits, num).proportion_ci(method="wilson")
    assert wilson_interval(hits / num, num) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert all(0 <= bound <= 1 and math.copysign(1, bound) == 1 for bound in wilson_interval(hits / num, num))


def test_figures_keep_the_order_of_the_task_and_intervals_of_their_own() -> None:
    infos = {name: FigureInfo(title=name, caption="") for name in ("b", "a", "absent")}
    [one, two] = (
        Outcome(figures={"a": Measured(value=value), "b": Measured(value=value, interval=(0.1, 0.2))})
        for value in (0.1, 0.3)
    )
    alone = summarize(infos, [one])
    assert list(alone) == ["b", "a"]
    assert (alone["b"].interval, alone["a"].interval) == ((0.1, 0.2), None)
    both = summarize(infos, [one, two])
    assert both["a"].value == pytest.approx(0.2)
    # Student's t of one degree of freedom is 12.706; the standard error of 0.1 and 0.3 is 0.1.
    assert both["a"].interval == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), rel=1e-4)
    unnamed = replace(one, figures={"other": Measured(value=0.0)})
    with pytest.raises(AssertionError, match="does not name"):
        summarize(infos, [unnamed])


def test_results_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [result(), result(task="knn", seeds=(0, 1), chosen=({"c": 1.0},), notes=("x",))])
    assert read_results(path)[0] == result()
    assert read_results(path)[1].chosen == ({"c": 1.0},)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not a file of results"),
        ("{}", "is not a file of results"),
        ("[]", "is not a file of results"),
        (json.dumps({"format": "moco-fast-results", "version": 9, "results": []}), "has version 9"),
        (json.dumps({"format": "moco-fast-results", "version": 1, "results": [{}]}), "is not a file of results"),
    ],
)
def test_other_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_results(path)


def test_the_table_has_a_line_per_figure_and_a_column_per_encoder() -> None:
    untrained = result(
        encoder={"name": "untrained", "digest": "u"}, figures={"top1": Figure(value=0.05, title="top-1")}
    )
    assert aligned(table([result(), untrained])).splitlines() == [
        "task       figure  runs/first                 untrained",
        "linear v2  top-1   68.10% (67.70% to 68.50%)  5.00%",
        "linear v2  size    12.35                      -",
    ]


def test_a_terminal_shows_what_an_encoder_is_above_the_table() -> None:
    run = result(encoder={"name": "first (resnet50, query encoder)", "digest": "a"})
    untrained = result(encoder={"name": "untrained", "digest": "u"})
    assert as_text([run, untrained]).splitlines()[:2] == [
        "first: resnet50, query encoder",
        "task       figure  first                      untrained",
    ]
    key = result(encoder={"name": "first (resnet50, key encoder)", "digest": "k"})
    assert as_text([run, key]).splitlines()[0].endswith("first (resnet50, key encoder)")


# Published figures -----------------------------------------------------------------------------------------------


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_ours_stands_above_what_was_published_for_the_same_benchmark() -> None:
    printed = lines(beside_published([result()]))
    assert printed[1] == "ImageNet-1k linear v1 top1 runs/first 68.10 measured here"
    assert "ImageNet-1k linear v1 top1 ResNet-50 MoCo v2, 200 epochs 67.5 authors" in printed
    assert "ImageNet-1k linear v1 top1 ResNet-50 w4x MoCo v1, 200 epochs 68.6 paper" in printed
    assert not any("knn" in line or "v3" in line for line in printed)


def test_knn_is_compared_at_the_same_k() -> None:
    figures = {name: Figure(value=value, title=name) for name, value in (("top1", 0.5), ("top1_k20", 0.6))}
    settings = {"k": [200, 20], "temperature": [0.07], "layer": "backbone"}
    printed = lines(beside_published([result(task="knn", protocol="", settings=settings, figures=figures)]))
    ours, theirs = printed.index("ImageNet-1k knn top1_k200 runs/first 50.00 measured here"), 1
    assert printed[ours + theirs] == "ImageNet-1k knn top1_k200 ResNet-50 MoCo v2, 200 epochs 52.5 open-mmlab/mmselfsup"
    assert "ImageNet-1k knn top1_k20 ResNet-50 MoCo v2, 200 epochs 55.7 open-mmlab/mmselfsup" in printed
    assert not any("top1_k10 " in line for line in printed)


def test_a_set_that_is_no_benchmark_is_said_to_be_none() -> None:
    small = result(data={"train": IMAGENET, "test": {**IMAGENET, "num_samples": 72, "num_classes": 18}})
    assert beside_published([small]) == (
        "linear of runs/first: a test set of 72 samples in 18 classes is no published benchmark"
    )


def test_eval_paper_prints_all_that_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "paper"]) == 0
    printed = lines(capsys.readouterr().out)
    assert len(printed) == 1 + len(PUBLISHED)
    assert "VOC07+12 detect voc-c4 AP50 ResNet-50 MoCo v1, 200 epochs 81.5 authors (mean of 5 runs)" in printed
    write_results(tmp_path / "ours.json", [result()])
    assert main(["eval", "paper", str(tmp_path / "ours.json")]) == 0
    assert "measured here" in capsys.readouterr().out


def test_every_published_figure_is_named_once_and_has_a_source() -> None:
    keys = [(each.benchmark, each.task, each.figure, each.encoder, each.pretraining, each.source) for each in PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert all(each.source and 0 < each.value < 100 for each in PUBLISHED)
    sizes = [(each.num_classes, each.num_test, each.num_train) for each in BENCHMARKS.values()]
    assert len(set(sizes)) == len(sizes)
