import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_fast.config import Config, EvalConfig, ModelConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.registry import EVALUATIONS, open_evaluations
from moco_fast.presets import PRESETS
from moco_fast.report.record import read_run
from moco_fast.training.loop import train
from pipelines.world import World


class ToyEvaluation:
    """How large the encoder's weights are."""

    def figures(self, encoder: Encoder, *, device: torch.device, world: World) -> dict[str, float]:
        return {"toy/weight": sum(weight.abs().sum().item() for weight in encoder.parameters())}

    def line(self, figures: Mapping[str, float]) -> str:
        return f"weights {figures['toy/weight']:.1f}"


def open_toy(config: Config) -> ToyEvaluation | None:
    return ToyEvaluation() if config.run.seed == 7 else None


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


def test_a_new_evaluation_is_one_class_and_one_line(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    monkeypatch.setitem(EVALUATIONS, "toy", f"{__name__}:open_toy")
    assert train(configuration(packed_demo, tmp_path / "run", seed=7)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("toy/weight" in line for line in lines) == 2  # before the first step and after the last
    assert read_run(tmp_path / "run").evaluations == []


def test_only_what_was_asked_for_is_opened(packed_demo: Any, tmp_path: Path) -> None:
    config = configuration(packed_demo, tmp_path)
    assert open_evaluations(config) == []
    with_knn = dataclasses.replace(config, eval=EvalConfig(shards=str(packed_demo.val)))
    [knn] = open_evaluations(with_knn)
    assert knn.line({"knn/top1": 0.256}) == "kNN top-1 25.6%"
    absent = dataclasses.replace(config, eval=EvalConfig(shards=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="nowhere"):
        open_evaluations(absent)
