"""The classifier that is trained beside a run: what it learns, and that nothing of the run depends on it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from moco_fast import checkpoint, distributed
from moco_fast.config import BatchNormConfig, CheckpointConfig, Config, EvalConfig, ModelConfig, OptimConfig, RunConfig
from moco_fast.encoders.encoder import ENCODERS
from moco_fast.evaluation.base import FigureInfo, Inputs, Outcome, Task, Want
from moco_fast.evaluation.online import OnlineProbe
from moco_fast.evaluation.registry import TASKS
from moco_fast.methods.registry import METHODS, method_class
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from moco_fast.training.build import build
from moco_fast.training.loop import train
from moco_fast.training.runtime import start
from pipelines.batch import Batch
from pipelines.config import DataConfig
from tests.batches import random_batch
from tests.moco_fast.small_runs import small_run
from tests.moco_fast.tiny_encoder import TinyEncoder

CPU = torch.device("cpu")
DIM, CLASSES = 6, 3


def samples(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(8, DIM) features and their labels, some of which there are not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    labels[2::3] = -1
    return torch.randn(8, DIM, generator=generator), labels


def probe() -> OnlineProbe:
    return OnlineProbe(DIM, CLASSES, lr=0.1, seed=1, device=CPU)


def test_it_takes_the_steps_of_cross_entropy_by_adamw() -> None:
    before = torch.get_rng_state()
    ours, theirs = probe(), nn.utils.skip_init(nn.Linear, DIM, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0)
    for number in range(5):
        features, labels = samples(number)
        scores = theirs(features)
        right = (scores.argmax(dim=1) == labels)[labels >= 0].float().mean()
        assert ours.step(features, labels) == right
        nn.functional.cross_entropy(scores, labels, ignore_index=-1).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    kept = ours.weight.clone()
    fresh = probe()
    assert fresh.step(features, torch.full((8,), -1)).isnan()
    assert torch.equal(fresh.weight, probe().weight)
    assert not torch.equal(kept, fresh.weight)


def steps_on_this_rank() -> dict[str, Any]:
    ours = probe()
    for number in range(3):
        features, labels = samples(number)
        own = slice(8 * distributed.rank() // distributed.world_size(), None)
        own = slice(own.start, own.start + 8 // distributed.world_size())
        ours.step(features[own], labels[own])
    return {name: each.detach().clone() for name, each in ours.state_dict().items()}


def test_two_ranks_have_the_same_classifier_as_one(run_ranks: Any) -> None:
    alone = steps_on_this_rank()
    first, second = run_ranks(steps_on_this_rank)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


# In a step -------------------------------------------------------------------------------------------------------


SMALL = {"dim": 4, "mlp_dim": 6, "predictor_dim": 3, "queue_size": 16, "num_negatives": 12}


def small(name: str, shards: Path, *, online_probe: bool, **run: Any) -> Config:
    cls = method_class(name)
    names = {field.name for field in dataclasses.fields(cls)}
    method = cls(**{option: value for option, value in SMALL.items() if option in names})
    synchronized = "auto" not in method.bn_policies
    return Config(
        data=DataConfig(shards=str(shards), batch_size=8, backend="dali", num_threads=1),
        model=ModelConfig(encoder="small"),
        method=method,
        bn=BatchNormConfig(policy="sync") if synchronized else BatchNormConfig(num_groups=2),
        optim=OptimConfig(lr=0.1),
        run=RunConfig(device="cpu", steps=10, **run),
        eval=EvalConfig(online_probe=online_probe),
    )


def batch(number: int) -> Batch:
    made = random_batch(number, 8, 8)
    return dataclasses.replace(made, label=torch.arange(number, number + 8) % 18 - (number % 2))


def own_rows(made: Batch) -> Batch:
    def own(rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(distributed.world_size())[distributed.rank()]

    return dataclasses.replace(made, views=tuple(map(own, made.views)), index=own(made.index), label=own(made.label))


def outcome(
    config: Config, *, accumulate: int, env: Mapping[str, str] | None = None
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What steps report, and all that is left of them; of several ranks, each takes its rows of a batch."""
    runtime = start(config.run, env={} if env is None else env)
    parts = build(config, runtime)
    parts.loader.close()
    reported = []
    for step in range(3):
        batches = [own_rows(batch(10 * step + number)) for number in range(accumulate)]
        scheduled = config.method.scheduled(step, 10)
        reported.append(parts.train_step(batches, lr=0.1, scheduled=scheduled))
    if env is None:
        runtime.close()
    left = {f"{name}.{key}": each for name, part in parts.modules.items() for key, each in part.state_dict().items()}
    return reported, left | {"rng": torch.get_rng_state()}


def assert_bit_equal(without: Any, beside: Any) -> None:
    (reported, left), (reported_beside, left_beside) = without, beside
    for one, other in zip(reported, reported_beside, strict=True):
        assert other.keys() - one.keys() == {"probe/top1"}
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
        assert 0 <= other["probe/top1"] <= 1
    assert left_beside.keys() - left.keys() == {"probe.weight", "probe.bias"}
    assert [name for name, value in left.items() if not torch.equal(value, left_beside[name])] == []


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", METHODS)
def test_no_bit_of_a_method_depends_on_it(packed_demo: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(ENCODERS, "small", TinyEncoder)
    for accumulate in (1, 2):
        results = [
            outcome(small(name, packed_demo.train, online_probe=each, precision="fp32"), accumulate=accumulate)
            for each in (False, True)
        ]
        assert_bit_equal(*results)
        assert results[1][1]["probe.weight"].shape == (18, 4)


def with_and_without_on_this_rank(shards: str) -> list[Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ENCODERS, "small", TinyEncoder)
        patched.setenv("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        found = []
        for online_probe in (False, True):
            config = small("momentum-contrast", Path(shards), online_probe=online_probe, precision="fp32")
            try:
                found.append(outcome(config, accumulate=1, env=os.environ))
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
    return found


def test_nor_of_two_ranks_which_have_one_probe(run_ranks: Any, packed_demo: Any) -> None:
    ranks = run_ranks(with_and_without_on_this_rank, str(packed_demo.train))
    for without, beside in ranks:
        assert_bit_equal(without, beside)
    (_, first), (_, second) = (beside for _, beside in ranks)
    for name in ("probe.weight", "probe.bias"):
        assert torch.equal(first[name], second[name])
    fresh = OnlineProbe(4, 18, lr=0.1, seed=0, device=CPU)
    assert not torch.equal(first["probe.weight"], fresh.weight)


@pytest.mark.usefixtures("fresh_accelerator")
def test_nor_in_half_precision(packed_demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "small", TinyEncoder)
    configs = [small("momentum-contrast", packed_demo.train, online_probe=each, precision="bf16") for each in (0, 1)]
    assert_bit_equal(*(outcome(config, accumulate=1) for config in configs))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", ["momentum-contrast", "simsiam"])
def test_nor_of_a_compiled_encoder(packed_demo: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(ENCODERS, "small", TinyEncoder)
    results = []
    for each in (False, True):
        torch.compiler.reset()
        config = small(name, packed_demo.train, online_probe=each, precision="fp32", compile=True)
        results.append(outcome(config, accumulate=1))
    assert_bit_equal(*results)


# In a run --------------------------------------------------------------------------------------------------------

FAILS: list[int] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(Task):
    """A task that measures nothing, and at which a run dies as often as the test says."""

    name: ClassVar[str] = "failing"
    live: ClassVar[bool] = True

    def wants(self) -> tuple[Want, ...]:
        return ()

    def figures(self) -> dict[str, FigureInfo]:
        return {"zero": FigureInfo(title="Zero", caption="Nothing.")}

    def measure(self, inputs: Inputs) -> Outcome:
        from moco_fast.evaluation.base import Measured

        if FAILS and FAILS.pop():
            raise RuntimeError("killed")
        return Outcome(figures={"zero": Measured(value=0.0)})


def run_configuration(packed_demo: Any, out: Path, *, online_probe: bool) -> Config:
    return dataclasses.replace(
        small_run(packed_demo.train, out, steps=6),
        checkpoint=CheckpointConfig(every_steps=2, keep=1),
        eval=EvalConfig(
            shards=str(packed_demo.val), tasks=("failing",), every_steps=3, online_probe=online_probe, probe_lr=0.01
        ),
    )


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(out / "checkpoints" / "step-00000006")
    return {**saved.model, **saved.optimizer}


def test_a_run_logs_it_and_continues_it_bit_for_bit(
    packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: Any
) -> None:
    monkeypatch.setitem(TASKS, "failing", f"{__name__}:Failing")
    FAILS.clear()
    for name, online_probe in (("without", False), ("whole", True)):
        assert train(run_configuration(packed_demo, tmp_path / name, online_probe=online_probe)) == 0
    FAILS[:] = [1, 0]  # at the second evaluation, after step 3
    with pytest.raises(RuntimeError, match="killed"):
        train(run_configuration(packed_demo, tmp_path / "cut", online_probe=True))
    assert train(run_configuration(packed_demo, tmp_path / "cut", online_probe=True)) == 0
    assert losses(tmp_path / "without") == losses(tmp_path / "whole") == losses(tmp_path / "cut")
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert {"probe.weight", "probe.exp_avg/weight", "probe.step/bias"} <= whole.keys() == cut.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, cut[name])] == []
    record = read_run(tmp_path / "whole")
    assert [step for step, _ in record.curve("probe/top1")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in record.curve("probe/held_out_top1")] == [0, 3, 6]
    page = write_report(tmp_path / "whole", device=CPU, num_samples=1).read_text()
    for title in ("Online probe", "Online probe on training views"):
        assert f'aria-label="{title} over training steps"' in page


def test_without_labels_it_is_refused(packed_demo: Any, tmp_path: Path, fresh_accelerator: Any) -> None:
    config = run_configuration(packed_demo, tmp_path / "run", online_probe=True)
    [shard] = packed_demo.train.glob("*.tar")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / shard.name).symlink_to(shard)
    data = dataclasses.replace(config.data, shards=str(tmp_path / "tars"), stream_samples=32)
    config = dataclasses.replace(config, data=data, eval=EvalConfig(online_probe=True))
    with pytest.raises(ValueError, match=r"--eval\.online-probe learns from the labels of training samples"):
        train(config)
    assert not (tmp_path / "run").exists()
