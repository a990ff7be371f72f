import os

import pytest
import torch

from moco_fast.config import RunConfig
from moco_fast.training.runtime import allow_tf32, alone_by_mistake, choose_compile, choose_precision, start


@pytest.mark.parametrize(
    ("asked", "launcher", "has_bf16", "expected"),
    [
        ("auto", None, False, "fp32"),
        ("auto", None, True, "bf16"),
        ("auto", "no", True, "bf16"),  # the launcher says "no" also when nobody chose
        ("auto", "no", False, "fp32"),
        ("auto", "fp16", True, "fp16"),
        ("auto", "bf16", False, "bf16"),
        ("fp32", "bf16", True, "fp32"),
        ("bf16", None, False, "bf16"),
        ("fp16", "fp16", True, "fp16"),
        ("tf32", "bf16", True, "tf32"),
    ],
)
def test_whose_word_wins(asked, launcher, has_bf16, expected):
    precision, note = choose_precision(asked, launcher, has_bf16=has_bf16)
    assert precision == expected
    assert expected in note


def test_an_overruled_launcher_is_told():
    assert "over the launcher's bf16" in choose_precision("fp32", "bf16", has_bf16=True)[1]
    assert "launcher" not in choose_precision("fp32", "no", has_bf16=True)[1]


def test_fp8_is_refused():
    with pytest.raises(ValueError, match="fp8 is not supported"):
        choose_precision("auto", "fp8", has_bf16=True)


@pytest.mark.parametrize(
    ("run", "launcher", "expected"),
    [
        (RunConfig(), None, None),
        (RunConfig(), "NO", None),
        (RunConfig(compile=True), "NO", {"backend": "inductor"}),
        (RunConfig(), "INDUCTOR", {"backend": "inductor"}),
        (RunConfig(compile=True), "AOT_EAGER", {"backend": "aot_eager"}),
        (RunConfig(cuda_graphs=True), None, {"backend": "inductor", "mode": "reduce-overhead"}),
        (RunConfig(cuda_graphs=True, compile=True), "INDUCTOR", {"backend": "inductor", "mode": "reduce-overhead"}),
    ],
)
def test_who_compiles(run, launcher, expected):
    options, note = choose_compile(run, launcher)
    assert options == expected
    assert (note is None) == (expected is None)


def test_graphs_come_from_inductor_alone():
    with pytest.raises(ValueError, match="needs inductor"):
        choose_compile(RunConfig(cuda_graphs=True), "EAGER")


@pytest.mark.parametrize(
    ("env", "alone"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "a"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_ADDR": "a"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, True),
    ],
)
def test_a_process_alone_by_mistake_is_found(env, alone):
    assert bool(alone_by_mistake(env)) == alone


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU"):
        start(RunConfig(device="cuda"), env={})
    with pytest.raises(ValueError, match="tf32 needs a GPU"):
        start(RunConfig(precision="tf32"), env={})
    with pytest.raises(ValueError, match="cuda-graphs needs a GPU"):
        start(RunConfig(cuda_graphs=True), env={})
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        start(RunConfig(device="cpu", precision="fp16"), env={})


def test_products_are_rounded_only_when_asked():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed, expected in ((True, ("high", "tf32")), (False, ("highest", "ieee"))):
            allow_tf32(allowed)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision) == expected
            # Inductor reads this one, which raises where convolutions and RNNs differ.
            assert torch.backends.cudnn.allow_tf32 == allowed
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_deterministic_kernels_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "kept")
    for deterministic in (False, True):
        start(RunConfig(device="cpu", deterministic=deterministic), env={}).close()
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "kept"
