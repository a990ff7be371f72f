"""Exchange between the ranks' hosts: the same over gloo and over the store, which takes gloo's place where it fails."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from moco_fast import checkpoint, host_exchange
from moco_fast.host_exchange import open_exchange
from moco_fast.stop import StopSignal
from moco_fast.training.loop import train
from tests.moco_fast.small_runs import small_run

NO_SUCH_NETWORK = "nosuch0"


def without_gloo(rank: int) -> None:
    """Let gloo fail on a rank, as it does beside NCCL, after the world's own group has been made."""
    host_exchange.CONNECTING_S = 2.0
    if dist.get_rank() == rank:
        os.environ["GLOO_SOCKET_IFNAME"] = NO_SUCH_NETWORK


def with_gloo() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def exchanged(failing: int) -> Any:
    without_gloo(failing)
    try:
        exchange, second = (open_exchange(timeout_s=90) for _ in range(2))
    finally:
        with_gloo()
    rank = dist.get_rank()
    largest = []
    for step in range(5):
        values = [0, 0, 0]
        values[rank] = step * (rank + 1)
        largest.append(exchange.begin_max(values)())
    waiting = [exchange.begin_gather(torch.full((3,), 10 * step + rank, dtype=torch.uint8)) for step in range(2)]
    gathered = [[each.tolist() for each in wait()] for wait in waiting for _ in range(2)]
    return exchange.note, second.note, exchange.name != second.name, largest, gathered


@pytest.mark.parametrize("failing", [2, 1])
def test_all_ranks_exchange_the_same_way_and_get_the_same(run_ranks: Callable[..., Any], failing: int) -> None:
    of_ranks = run_ranks(exchanged, failing)
    gathered = [[[10 * step] * 3, [10 * step + 1] * 3] for step in range(2) for _ in range(2)]
    for rank, (note, second_note, differ, largest, at_first) in enumerate(of_ranks):
        assert differ
        assert largest == [[step, 2 * step, 0] for step in range(5)]
        assert at_first == (gathered if rank == 0 else [[]] * 4)
        assert second_note is None
        if failing == 2:
            assert note is None
        else:
            assert note.startswith("network: gloo cannot connect the ranks (rank ")
            assert "GLOO_SOCKET_IFNAME names the network" in note
    assert len({note for note, *_ in of_ranks}) == 1


def keys_left() -> int:
    without_gloo(0)
    try:
        exchange = open_exchange(timeout_s=90)
    finally:
        with_gloo()
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    for step in range(20):
        exchange.begin_max([step % 3])()
        exchange.begin_gather(torch.zeros(4, dtype=torch.uint8))()
    dist.barrier()
    return store.num_keys() - before


def test_a_run_leaves_no_heap_of_keys_in_the_store(run_ranks: Callable[..., Any]) -> None:
    # For each of two ranks: what is told of the last one, and two gathers of which one may still be read.
    assert all(left <= 2 * 3 for left in run_ranks(keys_left))


def signal_seen() -> Any:
    without_gloo(1)
    try:
        stop = StopSignal(timeout_s=90)
    finally:
        with_gloo()
    seen = []
    for step in range(6):
        if step == 2 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        if step == 1 and dist.get_rank() == 0:
            stop.ask(3)
        seen.append((stop.poll(), stop.granted()))
    reached = threading.Event()
    deliver, stop._deliver = stop._deliver, lambda number: (deliver(number), reached.set())
    stop._received = 0
    with stop.reaching_all():
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        elif not reached.wait(90):
            raise AssertionError("the signal to the first rank did not come")
    stop.close()
    return stop.note is None, seen


def test_ranks_agree_on_stopping_where_gloo_fails(run_ranks: Callable[..., Any]) -> None:
    nothing, asked, told = (0, 0), (0, 3), (signal.SIGTERM, 0)
    assert run_ranks(signal_seen) == [(False, [nothing, nothing, asked, told, told, told])] * 2


def trained(shards: str, out: str) -> Any:
    without_gloo(1)
    try:
        return train(small_run(Path(shards), Path(out), steps=3))
    finally:
        with_gloo()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_without_gloo_trains_and_keeps_the_states_of_all_ranks(
    run_ranks: Callable[..., Any], packed_demo: Any, tmp_path: Path
) -> None:
    assert run_ranks(trained, str(packed_demo.train), str(tmp_path / "run")) == [0, 0]
    newest = checkpoint.find_newest(tmp_path / "run/checkpoints")
    assert newest is not None
    assert {name.partition(".")[0] for name in checkpoint.load(newest).rng} == {"0", "1"}


def waits_for_the_dead() -> str:
    without_gloo(0)
    try:
        exchange = open_exchange(timeout_s=3)
    finally:
        with_gloo()
    if dist.get_rank() == 1:
        return ""
    wait = exchange.begin_max([1])
    with pytest.raises(RuntimeError) as refused:
        wait()
    return type(refused.value).__name__


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_time_out(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(waits_for_the_dead)[0] != ""
