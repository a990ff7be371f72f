"""What one rank of two cannot do ends both, with one message, wherever the other one waits."""

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from moco_fast import checkpoint
from moco_fast.cli import main
from moco_fast.transfer import segmenting
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.segmenting import TrainingCrops
from tests.moco_fast.transfer.pixel_shapes import write_voc_pixels

REASON = "[Errno 28] No space left on device"
# A rank whose other end is gone would wait for days, and the tests' own limit for ranks is two minutes.
FAULTS: dict[str, tuple[int, Any, str, int]] = {
    "first batch": (1, TrainingCrops, "together", 1),
    "batch": (1, TrainingCrops, "together", 3),
    "state": (0, checkpoint, "save", 1),
    "test image": (1, segmenting, "_decoded", 1),
    "pictures": (0, segmenting, "pixel_gallery", 1),
    "record": (0, json, "dumps", 0),
}


def transfer(data: str, out: str, *words: str) -> tuple[int, list[str]]:
    """Return the exit code and what is said of the error."""
    given = ["--data", data, "--init", "random", "--network", "resnet18_quarter", "--out", out, "--crop", "33"]
    given += ["--batch-size", "2", "--steps", "4", "--threads", "1", "--device", "cpu", "--save-every-steps", "3"]
    said = io.StringIO()
    # With the workers' own seed, which is that of the first training, new weights would be those of before.
    torch.manual_seed(5)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(["transfer", "segment", *given, *words])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return code, [line for line in said.getvalue().splitlines() if line.startswith("error")]


def with_fault(data: str, out: str, fault: str) -> tuple[int, list[str]]:
    rank, owner, name, number = FAULTS[fault]
    plain, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number or (number == 0 and isinstance(arguments[0], dict) and "num_untested" in arguments[0]):
            raise OSError(28, "No space left on device")
        return plain(*arguments, **options)

    if int(os.environ["RANK"]) != rank:
        return transfer(data, out)
    setattr(owner, name, call)
    try:
        return transfer(data, out)
    finally:
        setattr(owner, name, plain)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pixels") / "VOC2012"
    return str(write_voc_pixels(folder, {"train_aug": 4, "val": 3}).parent)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_rank_cannot_do_ends_both_with_one_message(
    run_ranks: Callable[..., Any], data: str, tmp_path: Path, fault: str
) -> None:
    out = str(tmp_path / "out")
    assert run_ranks(with_fault, data, out, fault) == [(2, [f"error: {REASON}"]), (2, [])]
    # No state has learned from batches that are not its own.
    states = {path.name for path in Path(out).glob("trainings/*/step-*")}
    assert not states if fault in ("first batch", "batch", "state") else states == {"step-00000004"}


def with_a_failing_forward(data: str, out: str, ranks: list[int], error: type[Exception]) -> tuple[int, list[str]]:
    plain, calls = PixelNetwork.forward, [0]

    def forward(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error("the boxes of an image have no height")
        return plain(*arguments)

    if int(os.environ["RANK"]) not in ranks:
        return transfer(data, out)
    PixelNetwork.forward = forward
    try:
        return transfer(data, out)
    finally:
        PixelNetwork.forward = plain


@pytest.mark.parametrize("error", [ValueError, OSError])
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_a_forward_pass_that_fails_ends_both_with_one_message(
    run_ranks: Callable[..., Any], data: str, tmp_path: Path, ranks: list[int], error: type[Exception]
) -> None:
    outcomes = run_ranks(with_a_failing_forward, data, str(tmp_path / "out"), ranks, error)
    assert [code for code, _ in outcomes] == [2, 2]
    assert [line for _, said in outcomes for line in said] == ["error: the boxes of an image have no height"]


def of_ranks(data: str, out: str, *words: str) -> tuple[int, list[str]]:
    return transfer(data, out, *words)


@pytest.mark.parametrize(
    "words", [("--lr", "-1"), ("--batch-size", "3"), ("--train", "VOC2012/none"), ("--lr", "1e30")]
)
def test_what_all_ranks_see_is_said_once(
    run_ranks: Callable[..., Any], data: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (code, [said]), (other, silent) = run_ranks(of_ranks, data, str(tmp_path / "out"), *words)
    assert code == other == 2
    assert words[0] in said
    assert silent == []


def on_rank_1_elsewhere(data: str, out: str) -> tuple[int, list[str]]:
    return transfer(data if os.environ["RANK"] == "0" else f"{data}/nowhere", out)


def test_data_that_one_rank_does_not_see_ends_both(run_ranks: Callable[..., Any], data: str, tmp_path: Path) -> None:
    (code, [said]), (other, silent) = run_ranks(on_rank_1_elsewhere, data, str(tmp_path / "out"))
    assert code == other == 2
    assert "nowhere" in said
    assert silent == []
