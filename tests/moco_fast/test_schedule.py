import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.config import OptimConfig, RunConfig
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.presets import PRESETS
from moco_fast.training.schedule import describe_lr, lr_at, run_length
from pipelines.config import DataConfig


def test_v1_drops_to_a_tenth_at_120_and_160_of_200_epochs():
    optim = OptimConfig(lr=0.03, schedule="step", milestones=(0.6, 0.8))
    by_epoch = [lr_at(epoch * 5004, 200 * 5004, optim) for epoch in range(200)]
    assert by_epoch == pytest.approx([0.03] * 120 + [0.003] * 40 + [0.0003] * 40)
    assert lr_at(120 * 5004 - 1, 200 * 5004, optim) == 0.03


def test_v2_is_a_cosine_from_peak_to_nearly_nothing():
    optim = OptimConfig(lr=0.03, schedule="cosine")
    for step in range(100):
        assert lr_at(step, 100, optim) == pytest.approx(0.5 * 0.03 * (1 + math.cos(math.pi * step / 100)))


def test_v3_warms_up_from_zero_then_follows_the_cosine_of_what_is_left():
    optim = OptimConfig(lr=2.4, schedule="cosine", warmup=0.1)
    values = [lr_at(step, 100, optim) for step in range(100)]
    assert values[:11] == pytest.approx([0.24 * step for step in range(11)])
    assert values[10:] == pytest.approx([1.2 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)])


def test_a_billion_images_decay_by_a_tenth_every_62500_of_1250000_steps():
    optim = OptimConfig(lr=0.12, schedule="exponential", decay=0.9, decay_every=0.05)
    for step in (0, 62_499, 62_500, 125_000, 1_249_999):
        assert lr_at(step, 1_250_000, optim) == pytest.approx(0.12 * 0.9 ** (step // 62_500))


def test_v3_momentum_rises_to_one_by_a_cosine():
    method = MomentumContrastV3(momentum=0.99)
    values = [method.scheduled(step, 100)["momentum"] for step in range(101)]
    assert values == pytest.approx([1 - 0.5 * (1 + math.cos(math.pi * i / 100)) * (1 - 0.99) for i in range(101)])
    assert (values[0], values[100]) == (pytest.approx(0.99), 1)
    assert MomentumContrast(momentum=0.999).scheduled(50, 100) == {"momentum": 0.999}


@given(
    schedule=st.sampled_from(["cosine", "step", "exponential", "constant"]),
    warmup=st.floats(0, 1),
    num_steps=st.integers(1, 300),
)
def test_any_schedule_stays_between_zero_and_the_peak(schedule, warmup, num_steps):
    optim = OptimConfig(lr=0.5, schedule=schedule, warmup=warmup)
    values = [lr_at(step, num_steps, optim) for step in range(num_steps)]
    assert all(0 <= value <= 0.5 for value in values)
    peak = values.index(max(values))
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[:peak] == sorted(values[:peak])


@pytest.mark.parametrize(
    ("run", "accumulate", "expected"),
    [
        (RunConfig(epochs=2), 1, 20),
        (RunConfig(epochs=0.25), 1, 2),
        (RunConfig(epochs=0.001), 1, 1),
        (RunConfig(epochs=2), 3, 7),
        (RunConfig(epochs=2, steps=7), 3, 7),
        (RunConfig(samples=64), 1, 2),
        (RunConfig(samples=65), 1, 3),
        (RunConfig(samples=65), 2, 2),
        (RunConfig(samples=1), 1, 1),
    ],
)
def test_a_run_is_as_long_as_asked_in_epochs_steps_or_samples(run, accumulate, expected):
    config = replace(
        PRESETS["moco-v2"][1],
        data=DataConfig(shards="s", batch_size=32),
        run=run,
        optim=OptimConfig(accumulate=accumulate),
    )
    assert run_length(config, batches_per_epoch=10) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_tells_whether_its_learning_rate_is_published(name):
    preset = PRESETS[name][1]
    said = describe_lr(preset)
    assert said.startswith(f"learning rate: {preset.optim.lr:g} for a batch of {preset.data.batch_size}, ")
    assert said.endswith(", as published" if name != "demo" else ", not a published value")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_another_batch_or_learning_rate_is_marked(name):
    preset = PRESETS[name][1]
    odd = replace(preset, data=replace(preset.data, batch_size=2 * preset.data.batch_size))
    assert "not a published value: published " in describe_lr(odd)
    assert describe_lr(odd).endswith(f"the linear rule would give {2 * preset.optim.lr:g}")
    linear = replace(odd, optim=replace(odd.optim, lr=2 * odd.optim.lr))
    assert describe_lr(linear).endswith("scaled by the linear rule")
    assert "not a published value" in describe_lr(replace(preset, optim=replace(preset.optim, lr=0.5)))
    accumulated = replace(preset, optim=replace(preset.optim, accumulate=2))
    assert f"a batch of {2 * preset.data.batch_size}, not a published value" in describe_lr(accumulated)


def test_the_authors_four_gpus_are_published():
    preset = PRESETS["moco-v2"][1]
    on_four = replace(preset, data=replace(preset.data, batch_size=128), optim=replace(preset.optim, lr=0.015))
    assert describe_lr(on_four) == "learning rate: 0.015 for a batch of 128, as published"
