import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.config import MocoConfig, OptimConfig
from moco_fast.schedule import lr_at, momentum_at


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
    moco = MocoConfig(momentum=0.99, momentum_schedule="cosine")
    values = [momentum_at(step, 100, moco) for step in range(101)]
    assert values == pytest.approx([1 - 0.5 * (1 + math.cos(math.pi * i / 100)) * (1 - 0.99) for i in range(101)])
    assert (values[0], values[100]) == (pytest.approx(0.99), 1)
    assert momentum_at(50, 100, MocoConfig(momentum=0.999)) == 0.999


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
