"""What a run says of itself: steps, memory, host, device."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moco_fast.config import ModelConfig, OptimConfig
from moco_fast.presets import PRESETS
from moco_fast.training import gauges as module
from moco_fast.training.build import build
from moco_fast.training.flops import PEAKS, encoder_flops, peak_flops, step_flops
from moco_fast.training.gauges import Gauges, HostCpu, StepClock
from moco_fast.training.runtime import start
from tests.batches import random_batch
from tests.moco_fast.small_runs import small_run

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def take_steps(clock: StepClock, now: list[float], *seconds: float, pause: float = 0.0) -> None:
    for each in seconds:
        clock.begin()
        now[0] += each
        clock.end()
        now[0] += pause


def test_steps_are_timed_one_by_one_and_what_is_between_them_is_not(clock: list[float]) -> None:
    steps = StepClock(CPU)
    take_steps(steps, clock, 1.0, 2.0, pause=100.0)
    first = steps.take()
    take_steps(steps, clock, *[4.0] * 8)
    assert first.seconds() == [1.0, 2.0]
    assert steps.take().seconds() == [4.0] * 8
    assert steps.take().seconds() == []
    assert steps.recent(3).seconds() == [4.0] * 3


def test_an_interval_has_percentiles_and_the_time_left(clock: list[float]) -> None:
    gauges = Gauges(CPU, num_steps=100)
    take_steps(gauges.clock, clock, 50.0)
    assert "time_left_s" not in gauges.take(1).wait()  # a first step compiles
    take_steps(gauges.clock, clock, *[1.0] * 19, 3.0, pause=0.5)
    found = gauges.take(21).wait()
    assert found["step_s_p50"] == 1.0
    assert found["step_s_p95"] == pytest.approx(1.1)
    assert found["step_s_max"] == 3.0
    assert found["time_left_s"] == pytest.approx(79 * (22 + 20 * 0.5) / 20)
    assert not {"mfu", "gpu_memory_used_gib"} & found.keys()


def test_utilization_is_the_share_of_what_the_device_can(clock: list[float]) -> None:
    gauges = Gauges(CPU, num_steps=100, flops=(3e12, 10e12))
    take_steps(gauges.clock, clock, 0.5, 0.7)
    assert gauges.take(2).wait()["mfu"] == pytest.approx(2 * 3e12 / 1.2 / 10e12)


def stat(tmp_path: Path, *cpus: str) -> Path:
    path = tmp_path / "stat"
    path.write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *cpus, "intr 5"]))
    return path


def test_host_cpu_counts_the_cpus_of_this_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 12})
    path = stat(tmp_path, "cpu0 0 0 0 0 0 0 0 0 0 0", "cpu1 0 0 0 0 0 0 0 0 0 0", "cpu12 10 0 0 50 0 0 0 0 0 0")
    cpu = HostCpu(cgroup=tmp_path, stat=path)
    assert cpu.share() is None  # no time has passed
    stat(tmp_path, "cpu0 20 5 5 60 5 1 1 3 20 0", "cpu1 999 0 0 0 0 0 0 0 0 0", "cpu12 10 0 0 150 0 0 0 0 0 0")
    assert cpu.share() == pytest.approx(35 / 200)
    path.unlink()
    assert cpu.share() is None


def test_host_cpu_under_a_quota_is_a_share_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 1000000\nuser_usec 5\n")
    cpu = HostCpu(cgroup=tmp_path)
    clock[0] += 10
    (tmp_path / "cpu.stat").write_text("usage_usec 11000000\nuser_usec 5\n")
    assert cpu.share() == pytest.approx(10 / 40)


def test_this_machine_tells() -> None:
    cpu = HostCpu()
    sum(number**2 for number in range(300_000))
    share = cpu.share()
    assert share is None or 0 <= share <= 1


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "fp32", 31.2),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_peaks_are_found_by_whole_words(name: str, precision: str, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else tera * 1e12)


def test_peaks_of_a_device_keep_the_relation_of_its_tensor_cores() -> None:
    # A figure with sparsity among dense ones would be off by two.
    for peaks in PEAKS.values():
        assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
        assert peaks["fp16"] / peaks.get("tf32", peaks["fp16"] / 2) == pytest.approx(2, rel=0.03)


def test_the_operations_of_a_resnet_are_the_published_ones() -> None:
    from moco_fast.encoders.encoder import build_encoder

    base = PRESETS["moco-v2"][1]
    with torch.device("meta"):
        encoder = build_encoder(base.model, base.method)
    forward = encoder_flops(encoder, 224, backward=False)
    # 4.09 billion multiplications (torchvision's table of ResNet-50), without the classifier, with the head.
    assert forward == pytest.approx(2 * 4.09e9, rel=0.01)
    assert encoder_flops(encoder, 224, backward=True) == pytest.approx(3 * forward, rel=0.03)


@pytest.mark.parametrize("name", ["moco-v2-symmetric", "end-to-end", "byol", "simsiam"])
def test_a_step_computes_what_its_method_says(name: str, packed_demo, fresh_accelerator, tmp_path: Path) -> None:
    of_recipe = PRESETS[name][1]
    sizes = {"dim": 4, "mlp_dim": 8, "predictor_dim": 4, "queue_size": 8}
    options = {option: size for option, size in sizes.items() if hasattr(of_recipe.method, option)}
    config = replace(
        small_run(packed_demo.train, tmp_path, steps=5),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=replace(of_recipe.method, **options),
        bn=replace(of_recipe.bn, policy="none"),
        optim=OptimConfig(accumulate=2),
    )
    runtime = start(config.run, env={})
    parts = build(config, runtime)
    parts.loader.close()
    before = {name: each.clone() for name, each in parts.query.state_dict().items()}
    counted = step_flops(config, parts.query, parts.objective.modules.get("key"), world_size=1)
    assert all(torch.equal(each, before[name]) for name, each in parts.query.state_dict().items())
    assert all(module.training for module in parts.query.modules())
    with FlopCounterMode(display=False) as counter:
        scheduled = config.method.scheduled(0, 5)
        parts.train_step([random_batch(0, 16, 32), random_batch(1, 16, 32)], lr=0.1, scheduled=scheduled)
    runtime.close()
    # The rest are similarities of tiny vectors.
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)
