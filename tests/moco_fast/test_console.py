from dataclasses import replace

import pytest

from moco_fast.config import validate
from moco_fast.presets import PRESETS
from moco_fast.training.console import ProgressLine, advice_on_speed
from shards.ground.units import format_duration


def recipe(*, batch=256, symmetric=False, **run):
    base = PRESETS["moco-v2"][1]
    data = replace(base.data, shards="x", batch_size=batch)
    return replace(base, data=data, method=replace(base.method, symmetric=symmetric), run=replace(base.run, **run))


@pytest.mark.parametrize(
    ("config", "where", "option"),
    [
        (recipe(), {"on_gpu": True, "world_size": 8}, "cuda_graphs"),
        (recipe(symmetric=True), {"on_gpu": True, "world_size": 8}, "compile"),
        (recipe(), {"on_gpu": False, "world_size": 8}, None),
        (recipe(compile=True), {"on_gpu": True, "world_size": 8}, None),
        (recipe(cuda_graphs=True), {"on_gpu": True, "world_size": 8}, None),
    ],
)
def test_small_batches_on_a_gpu_are_told_of_the_option_that_works_for_them(config, where, option):
    advice = advice_on_speed(config, **where)
    assert (advice is None) == (option is None)
    if advice is not None:
        assert advice == (
            "note: with 32 images per GPU, launching kernels takes longer than running them: "
            f"try --run.{option.replace('_', '-')}"
        )
        validate(replace(config, run=replace(config.run, **{option: True})))


def test_large_batches_on_a_gpu_are_told_of_compilation():
    advice = advice_on_speed(recipe(), on_gpu=True, world_size=1)
    assert advice is not None
    assert "--run.compile" in advice
    assert advice_on_speed(recipe(compile=True), on_gpu=True, world_size=1) is None


@pytest.mark.parametrize("shown", [True, False])
def test_without_a_terminal_an_interval_is_a_line_without_control_characters(shown, capfd):
    progress = ProgressLine(2000, 990, shown=shown)
    progress.step()
    line = {"step": 1000, "loss": 7.25, "samples_per_s": 1234.5, "data_wait_share": 0.031}
    progress.interval(line)
    progress.interval(line | {"time_left_s": 5400.0})
    progress.unpause()
    progress.close()
    out, err = capfd.readouterr()
    assert out == ""
    first = "step 1,000 of 2,000: loss 7.250, 1,234 samples/s, 3% waiting for data"
    assert err.splitlines() == ([first, f"{first}, {format_duration(5400)} left"] if shown else [])
    assert "\r" not in err
    assert "\x1b" not in err
