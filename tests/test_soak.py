"""benchmarks/soak.py tells what grows from what does not, and sees what a process holds."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load


@pytest.mark.parametrize(("growth", "holds"), [(0.0, True), (0.5, True), (1.5, False)])
def test_what_grows_by_a_hundredth_over_ten_thousand_steps_is_told(growth: float, holds: bool) -> None:
    soak = load("soak")
    steps = np.arange(0, 5000, 10)
    level = 100 + growth * steps / soak.PER_STEPS + np.sin(steps)
    level[:40] = 0  # the beginning does not count
    run = soak.Samples(backend="torch", steps=steps.tolist(), values={name: level.tolist() for name in soak.FIGURES})
    assert run.growth("threads") == pytest.approx(growth, abs=0.2)
    assert run.holds("threads") == holds
    shown = soak.verdict([run])
    assert ("GROWS" in shown, "flat" in shown) == (not holds, holds)


def test_of_a_short_run_nothing_is_said() -> None:
    soak = load("soak")
    steps = np.arange(0, 730, 10)
    level = np.where(steps < 200, 525.0, 541.0)  # as memory at the first save
    run = soak.Samples(backend="dali", steps=steps.tolist(), values={name: level.tolist() for name in soak.FIGURES})
    assert run.holds("PSS, MiB") is None
    shown = soak.verdict([run])
    assert ("too short" in shown, "GROWS" in shown, "flat" in shown) == (True, False, False)


def test_it_sees_descriptors_memory_and_shared_memory() -> None:
    soak = load("soak")
    before = soak.look_at(os.getpid())
    assert before.keys() == soak.FIGURES.keys()
    assert before["PSS, MiB"] > 1
    descriptor = os.memfd_create("soak")
    try:
        os.ftruncate(descriptor, 8 << 20)
        with mmap.mmap(descriptor, 8 << 20) as memory:
            memory[:] = bytes(8 << 20)
            after = soak.look_at(os.getpid())
    finally:
        os.close(descriptor)
    assert after["file descriptors"] - before["file descriptors"] == 2  # mmap keeps one of its own
    assert after["shared memory, MiB"] - before["shared memory, MiB"] == pytest.approx(8)
    assert after["PSS, MiB"] - before["PSS, MiB"] > 6


def test_what_a_run_wrote_last_is_found(tmp_path: Path) -> None:
    soak = load("soak")
    metrics = tmp_path / "metrics.jsonl"
    assert soak.last_step(metrics) == 0
    metrics.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 1}\n{"step": 3')
    assert soak.last_step(metrics) == 20
