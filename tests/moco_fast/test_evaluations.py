import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moco_fast.config import Config, EvalConfig, ModelConfig
from moco_fast.evaluation.base import FigureInfo, Inputs, Measured, Outcome, Task, Want
from moco_fast.evaluation.registry import TASKS, open_evaluations
from moco_fast.presets import PRESETS
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.report.words import tiles
from moco_fast.training.build import open_sets
from moco_fast.training.loop import train
from shards.sets.manifest import MANIFEST_NAME, Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Task):
    """How many numbers a feature has, and how large they are."""

    name: ClassVar[str] = "toy"

    @classmethod
    def for_run(cls, config: Config) -> "Toy | None":
        return cls() if config.run.seed == 7 else None

    def wants(self) -> tuple[Want, ...]:
        return (Want(split="train", at_most=10),)

    def figures(self) -> dict[str, FigureInfo]:
        caption = "Mean absolute value of ten features."
        return {"size": FigureInfo(title="Size of features", caption=caption, unit="number", best="lowest")}

    def measure(self, inputs: Inputs) -> Outcome:
        features = inputs.features(*self.wants())
        size = Measured(value=features.values.abs().mean().item())
        return Outcome(figures={"size": size}, facts={"dim": features.values.shape[1]})


def configuration(packed_demo: Any, out: Path, **run: Any) -> Config:
    base = PRESETS["demo"][1]
    return dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data, shards=str(packed_demo.train), batch_size=16, backend="torch", num_threads=1
        ),
        views=dataclasses.replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=dataclasses.replace(base.method, queue_size=64),
        run=dataclasses.replace(base.run, device="cpu", precision="fp32", steps=2, out=str(out), **run),
        log=dataclasses.replace(base.log, every_steps=1, tensorboard=False),
    )


def test_a_new_task_is_one_class_and_one_line(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    monkeypatch.setitem(TASKS, "toy", f"{__name__}:Toy")
    assert train(configuration(packed_demo, tmp_path / "run", seed=7)) == 0
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
    assert open_evaluations(config, open_sets(config)) == []
    with_knn = dataclasses.replace(config, eval=EvalConfig(shards=str(packed_demo.val)))
    [knn] = open_evaluations(with_knn, open_sets(with_knn))
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
        open_evaluations(config, open_sets(config))


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
