"""What the ranks of a machine read of a checkpoint, counted by the kernel."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.saving.reading import load_together

NUM_BYTES = 8 << 20


def bytes_asked_for() -> int:
    """Bytes that this process has read by calls; pages of a mapped file are not among them."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def load_and_count(path: str) -> tuple[int, float]:
    before = bytes_asked_for()
    saved = load_together(Path(path), is_first_of_node=dist.get_rank() == 0)
    read = bytes_asked_for() - before
    return read, saved.model["weight"].sum().item()


def refuse_together(path: str) -> str:
    try:
        load_together(Path(path), is_first_of_node=dist.get_rank() == 0)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    weights = {"weight": torch.ones(NUM_BYTES // 4)}
    return checkpoint.save(tmp_path, Checkpoint(step=3, config={}, model=weights, optimizer={}, rng={}), keep=1)


def test_one_rank_of_a_machine_reads_for_all(run_ranks, saved: Path) -> None:
    (by_first, sum_of_first), (by_second, sum_of_second) = run_ranks(load_and_count, str(saved))
    assert by_first >= NUM_BYTES
    assert by_second < NUM_BYTES / 50
    assert sum_of_first == sum_of_second == NUM_BYTES // 4


@pytest.mark.faults
def test_what_one_rank_finds_damaged_all_refuse(run_ranks, saved: Path) -> None:
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = run_ranks(refuse_together, str(saved))
    assert all("model.safetensors is not what was written" in each for each in said)
