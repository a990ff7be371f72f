import dataclasses
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from moco_fast import distributed
from moco_fast.config import Config, EvalConfig, ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.evaluation.base import Evaluation, FigureInfo, Inputs, Measured, Outcome, Task, Want
from moco_fast.evaluation.live import RunEvaluation
from moco_fast.evaluation.registry import TASKS, check_tasks, open_evaluation
from moco_fast.evaluation.tasks.few_shot import FewShot
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.report.words import tiles
from moco_fast.training.build import open_sets
from moco_fast.training.loop import train
from pipelines.world import World
from shards.sets import open_set
from shards.sets.manifest import MANIFEST_NAME, Manifest
from tests.moco_fast.small_runs import small_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Task):
    """How many numbers a feature has, and how large they are."""

    name: ClassVar[str] = "toy"
    live: ClassVar[bool] = True

    def wants(self) -> tuple[Want, ...]:
        return (Want(split="train", at_most=10),)

    def figures(self) -> dict[str, FigureInfo]:
        caption = "Mean absolute value of ten features."
        return {"size": FigureInfo(title="Size of features", caption=caption, unit="number", best="lowest")}

    def measure(self, inputs: Inputs) -> Outcome:
        features = inputs.features(*self.wants())
        size = Measured(value=features.values.abs().mean().item())
        return Outcome(figures={"size": size}, facts={"dim": features.values.shape[1]})


@dataclasses.dataclass(frozen=True)
class PackedSets:
    """Two folders of shards, as `packed_demo` has them."""

    train: Path
    val: Path


def configuration(packed_demo: Any, out: Path, **run: Any) -> Config:
    return small_run(packed_demo.train, out, steps=2, **run)


def test_a_new_task_is_one_class_and_one_line(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    monkeypatch.setitem(TASKS, "toy", f"{__name__}:Toy")
    config = configuration(packed_demo, tmp_path / "run")
    assert train(dataclasses.replace(config, eval=EvalConfig(tasks=("toy",)))) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("toy/size" in line for line in lines) == 2  # before the first step and after the last
    record = read_run(tmp_path / "run")
    (_, before), (step, after) = record.curve("toy/size")
    assert step == 2
    [tile] = [tile for tile in tiles(record) if tile.name == "Size of features"]
    assert tile.note.startswith(f"untrained {before:.4g}, {after - before:+.4g}")
    assert ("best" in tile.note) == (before < after)
    page = write_report(tmp_path / "run", device=torch.device("cpu"), num_samples=1).read_text()
    assert "Size of features over training steps" in page
    assert "Mean absolute value of ten features." in page
    assert "kNN" not in page


def test_only_what_was_asked_for_is_opened(packed_demo: Any, tmp_path: Path) -> None:
    config = configuration(packed_demo, tmp_path)
    assert open_evaluation(config, open_sets(config)) is None
    with_knn = dataclasses.replace(config, eval=EvalConfig(shards=str(packed_demo.val)))
    knn = open_evaluation(with_knn, open_sets(with_knn))
    assert knn is not None
    assert knn.line({"knn/top1": 0.256}) == "kNN top-1 25.6%"
    absent = dataclasses.replace(config, eval=EvalConfig(shards=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="nowhere"):
        open_sets(absent)


def test_labels_that_nothing_tells_are_refused(packed_demo: Any, tmp_path: Path) -> None:
    [shard] = packed_demo.train.glob("*.tar")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / shard.name).symlink_to(shard)
    config = configuration(packed_demo, tmp_path)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shards=str(tmp_path / "tars"), stream_samples=32),
        eval=EvalConfig(shards=str(packed_demo.val)),
    )
    with pytest.raises(ValueError, match=r"--eval.shards .*make-shards index .*/tars"):
        open_evaluation(config, open_sets(config))
    healthy = dataclasses.replace(config, eval=EvalConfig(shards=str(packed_demo.val), tasks=("health",)))
    check_tasks(healthy)
    assert open_evaluation(healthy, open_sets(healthy)) is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ("knn",)}, "--eval.tasks knn measures held-out samples: name some with --eval.shards"),
        ({"tasks": ("fly",)}, "there is no task 'fly'"),
        ({"tasks": ("frozen",), "shards": "val"}, "--eval.tasks frozen cannot be measured while a run goes on: choose"),
    ],
)
def test_tasks_that_a_run_cannot_measure_are_refused(
    packed_demo: Any, tmp_path: Path, options: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "live", False)
    monkeypatch.setitem(TASKS, "frozen", f"{__name__}:Toy")
    config = configuration(packed_demo, tmp_path)
    with pytest.raises(ValueError, match=says):
        check_tasks(dataclasses.replace(config, eval=EvalConfig(**options)))


ALL = ("knn", "linear", "health")


def evaluation_of(train: Path, held_out: Path, out: Path, **options: Any) -> tuple[Config, Evaluation]:
    config = configuration(PackedSets(train, held_out), out)
    options = {"k": 5, "crop": 1.0, "layer": "head", "shards": str(held_out)} | options
    config = dataclasses.replace(config, eval=EvalConfig(**options))
    evaluation = open_evaluation(config, open_sets(config))
    assert evaluation is not None
    return config, evaluation


def figures_on_this_rank(train: str, held_out: str, seed: int = 0) -> tuple[dict[str, float], int]:
    """What a run's evaluation finds, and how many images its encoder was given."""
    config, evaluation = evaluation_of(Path(train), Path(held_out), Path("run"), tasks=ALL, max_bank=100)
    torch.manual_seed(seed)
    encoder = build_encoder(config.model, config.method)
    seen: list[int] = []
    encoder.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    return evaluation.figures(encoder, device=torch.device("cpu"), world=world), sum(seen)


def test_the_encoder_runs_once_over_each_set_for_all_tasks(packed_demo: Any) -> None:
    figures, num_seen = figures_on_this_rank(str(packed_demo.train), str(packed_demo.val))
    assert num_seen == 100 + 72  # --eval.max-bank, and the held-out samples
    counted = {name: figures[name] for name in ("knn/num_bank", "linear/num_train", "health/num_samples")}
    assert counted == {"knn/num_bank": 100, "linear/num_train": 100, "health/num_samples": 72}
    assert {name.partition("/")[0] for name in figures} == set(ALL)
    config, alone = evaluation_of(packed_demo.train, packed_demo.val, Path("run"), tasks=("health",))
    torch.manual_seed(0)
    encoder = build_encoder(config.model, config.method)
    found = alone.figures(encoder, device=torch.device("cpu"), world=World())
    assert found == {name: value for name, value in figures.items() if name.startswith("health/")}


@pytest.mark.slow
def test_ranks_together_measure_what_one_does(run_ranks: Any, packed_demo: Any) -> None:
    sets = str(packed_demo.train), str(packed_demo.val)
    alone, num_seen = figures_on_this_rank(*sets)
    (first, by_first), (second, by_second) = run_ranks(figures_on_this_rank, *sets)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-4)
    assert (by_first, by_second) == (num_seen // 2, num_seen // 2)


def test_a_task_that_lacks_its_first_figure_shows_the_next(packed_demo: Any, tmp_path: Path) -> None:
    _, evaluation = evaluation_of(packed_demo.train, packed_demo.val, tmp_path / "run", tasks=("health",))
    assert isinstance(evaluation, RunEvaluation)
    task = FewShot(split="train", shots=(5, 1), episodes=2)  # 16 samples of a class, 15 of which are queries
    evaluation = dataclasses.replace(evaluation, tasks=(task,), sets={"train": open_set(str(packed_demo.train))})
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(dim=8), image_size=32, crop=1.0)
    figures = evaluation.figures(encoder.eval(), device=torch.device("cpu"), world=World())
    assert "few-shot/centroid_5_shot" not in figures
    assert evaluation.line(figures).startswith("5-way 1-shot, nearest centroid ")


def test_held_out_samples_are_bounded_too(packed_demo: Any) -> None:
    _, evaluation = evaluation_of(packed_demo.train, packed_demo.val, Path("run"), max_held_out=30, max_bank=20)
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(dim=8))
    figures = evaluation.figures(encoder, device=torch.device("cpu"), world=World())
    assert (figures["knn/num_bank"], figures["knn/num_queries"]) == (20, 30)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of shards: images of the classes `lion` and `zebra`, and those of `zebra` without a label."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("lion", "zebra"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 40), (30 * number, 20, 20)).save(folder / "images" / name / f"{number}.jpg")
    for name, source in (("labeled", "images"), ("unlabeled", "images/zebra")):
        words = ["pack", str(folder / source), "--out", str(folder / name), "--workers", "1"]
        program = f"import sys; from shards.cli import main; sys.exit(main({words!r}))"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return folder


def test_sets_with_different_classes_are_refused_before_the_folder_is_claimed(
    packed_demo: Any, others: Path, tmp_path: Path, fresh_accelerator: Any
) -> None:
    config = configuration(packed_demo, tmp_path / "run")
    config = dataclasses.replace(config, eval=EvalConfig(shards=str(others / "labeled")))
    with pytest.raises(ValueError, match=r"number their classes differently \('astronaut' is in one only\)"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", [(), ALL])
def test_without_labels_only_what_needs_none_is_measured(
    packed_demo: Any,
    others: Path,
    tmp_path: Path,
    fresh_accelerator: Any,
    tasks: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configuration(packed_demo, tmp_path / "run")
    config = dataclasses.replace(config, eval=EvalConfig(shards=str(others / "unlabeled"), tasks=tasks))
    assert train(config) == 0
    said = capsys.readouterr().err
    left_out = " and ".join(task for task in tasks if task != "health") or "knn"
    note = f"evaluation: {others / 'unlabeled'} holds no labels, so health is measured, not {left_out}"
    assert said.count("holds no labels") == 1
    assert note in said[: said.index("resnet18_quarter")]  # before what a run says once it has its folder
    ready, *rest = (line for line in said.splitlines() if line.startswith("start-up: "))
    assert re.fullmatch(r"start-up: ready after [\d.]+ s \(sets and model [\d.]+\)", ready)
    assert len(rest) == 1
    parts = r"sets and model [\d.]+, evaluation [\d.]+, first step [\d.]+"
    assert re.fullmatch(rf"start-up: first step after [\d.]+ s \({parts}\)", rest[0])
    record = read_run(tmp_path / "run")
    assert [step for step, _ in record.curve("health/rankme")] == [0, 2]
    assert all(name.partition("/")[0] in ("health", name) for line in record.evaluations for name in line)
    assert next(tile.name for tile in tiles(record)) == "RankMe"
    page = write_report(tmp_path / "run", device=torch.device("cpu"), num_samples=1).read_text()
    assert "uniformity over training steps" in page


def test_a_run_reads_the_manifest_of_each_of_its_sets_once(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    read: Counter[str] = Counter()
    from_json = Manifest.from_json

    def counted(text: str | bytes, *, where: str) -> Manifest:
        read[where] += 1
        return from_json(text, where=where)

    monkeypatch.setattr(Manifest, "from_json", counted)
    config = configuration(packed_demo, tmp_path / "run")
    assert train(dataclasses.replace(config, eval=EvalConfig(shards=str(packed_demo.val), every_steps=1))) == 0
    assert "knn/top1" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert read == {str(folder / MANIFEST_NAME): 1 for folder in (packed_demo.train, packed_demo.val)}
