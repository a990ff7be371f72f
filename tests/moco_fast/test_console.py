from dataclasses import replace

import pytest

from moco_fast.config import validate
from moco_fast.presets import PRESETS
from moco_fast.training.console import advice_on_launches


def recipe(*, batch=256, symmetric=False, **run):
    base = PRESETS["moco-v2"][1]
    data = replace(base.data, shards="x", batch_size=batch)
    return replace(base, data=data, method=replace(base.method, symmetric=symmetric), run=replace(base.run, **run))


@pytest.mark.parametrize(
    ("config", "where", "option"),
    [
        (recipe(), {"on_gpu": True, "world_size": 8}, "cuda_graphs"),
        (recipe(symmetric=True), {"on_gpu": True, "world_size": 8}, "compile"),
        (recipe(), {"on_gpu": True, "world_size": 1}, None),
        (recipe(), {"on_gpu": False, "world_size": 8}, None),
        (recipe(compile=True), {"on_gpu": True, "world_size": 8}, None),
        (recipe(cuda_graphs=True), {"on_gpu": True, "world_size": 8}, None),
    ],
)
def test_small_batches_on_a_gpu_are_told_of_the_option_that_works_for_them(config, where, option):
    advice = advice_on_launches(config, **where)
    assert (advice is None) == (option is None)
    if advice is not None:
        assert advice == (
            "note: with 32 images per GPU, launching kernels takes longer than running them: "
            f"try --run.{option.replace('_', '-')}"
        )
        validate(replace(config, run=replace(config.run, **{option: True})))
