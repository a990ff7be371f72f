import os
import pickle
import signal
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moco_fast import distributed
from moco_fast.interrupt import StoppedError
from moco_fast.speaking import is_known
from shards.sets.shard_table import ShardEntry, ShardTable

SHARD = ShardEntry(
    name="shard.tar",
    num_samples=1,
    num_rejected=0,
    num_bytes=1,
    digests={},
    max_width=1,
    max_height=1,
    max_bytes=1,
    outcomes={},
    rejections={},
)


def gather(batch):
    rows = torch.arange(batch * 3.0).reshape(batch, 3) + 100 * distributed.rank()
    return distributed.rank(), distributed.world_size(), distributed.all_gather_rows(rows)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_gather_rows_keeps_the_order_of_ranks(run_ranks, world_size):
    expected = torch.cat([torch.arange(6.0).reshape(2, 3) + 100 * rank for rank in range(world_size)])
    for rank, result in enumerate(run_ranks(gather, 2, world_size=world_size)):
        assert result[:2] == (rank, world_size)
        assert torch.equal(result[2], expected)


def exchange(channels_last):
    rank, world_size = distributed.rank(), distributed.world_size()
    rows = torch.zeros(2 * world_size, 3, 4, 5, dtype=torch.uint8)
    for row in range(len(rows)):
        rows[row] = (torch.arange(60) + 10 * row + 100 * rank).reshape(3, 4, 5)
    if channels_last:
        rows = rows.contiguous(memory_format=torch.channels_last)
    received = distributed.exchange_rows(rows)
    assert received.stride() == rows.stride()
    assert torch.equal(distributed.exchange_rows(received), rows)
    return rows, received


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_exchange_rows_transposes_parts_and_ranks(run_ranks, world_size, channels_last):
    sent, received = zip(*run_ranks(exchange, channels_last, world_size=world_size), strict=True)
    for i in range(world_size):
        for j in range(world_size):
            assert torch.equal(received[j][2 * i : 2 * i + 2], sent[i][2 * j : 2 * j + 2])


def average_and_broadcast():
    rank = distributed.rank()
    tensors = [torch.full((2, 2), 1.0 + rank), torch.full((), 5.0 * rank, dtype=torch.float64)]
    distributed.average_(tensors)
    mine = [torch.full((3,), rank), torch.full((2,), float(rank)).requires_grad_()]
    distributed.broadcast_(mine)
    return [t.detach() for t in tensors + mine]


def test_average_and_broadcast_over_dtypes(run_ranks):
    for averaged, averaged_double, integers, floats in run_ranks(average_and_broadcast):
        assert torch.equal(averaged, torch.full((2, 2), 1.5))
        assert torch.equal(averaged_double, torch.tensor(2.5, dtype=torch.float64))
        assert torch.equal(integers, torch.zeros(3, dtype=torch.int64))
        assert torch.equal(floats, torch.zeros(2))


def gradients(kind):
    """Each rank's loss weighs the result by its own number; the gradient must be that of the sum over ranks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    rows = (torch.arange(2.0 * world_size)[:, None] + 10 * rank).requires_grad_()
    operation = getattr(distributed, kind)
    result = operation(rows)
    weights = torch.arange(len(result) * 1.0)[:, None] + 100 * rank
    (result * weights).sum().backward()
    return result.detach(), rows.grad


def weights_by_rank(world_size, num_rows):
    return [torch.arange(num_rows * 1.0)[:, None] + 100 * rank for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_flow_back_through_collectives_to_the_rows_owner(run_ranks, world_size):
    num_rows = 2 * world_size
    for rank, (_, grad) in enumerate(run_ranks(gradients, "all_gather_rows", world_size=world_size)):
        total = sum(weights_by_rank(world_size, num_rows * world_size))
        assert torch.equal(grad, total[rank * num_rows : (rank + 1) * num_rows])
    results = run_ranks(gradients, "sum_over_ranks", world_size=world_size)
    expected = sum(torch.arange(num_rows * 1.0)[:, None] + 10 * rank for rank in range(world_size))
    for result, grad in results:
        assert torch.equal(result, expected)
        assert torch.equal(grad, sum(weights_by_rank(world_size, num_rows)))
    weights = weights_by_rank(world_size, num_rows)
    for rank, (_, grad) in enumerate(run_ranks(gradients, "exchange_rows", world_size=world_size)):
        for owner in range(world_size):
            assert torch.equal(grad[2 * owner : 2 * owner + 2], weights[owner][2 * rank : 2 * rank + 2])


def test_a_single_process_is_a_world_of_one():
    rows = torch.rand(4, 2, requires_grad=True)
    assert torch.equal(distributed.all_gather_rows(rows), rows)
    assert torch.equal(distributed.sum_over_ranks(rows), rows)
    assert torch.equal(distributed.exchange_rows(rows), rows)
    before = rows.detach().clone()
    distributed.average_([rows])
    distributed.broadcast_([rows])
    assert torch.equal(rows, before)
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)


def stop(inner):
    """Rank 1 is told to leave in the block; rank 0 is before a collective of it, or at the end."""
    try:
        with distributed.leaving_together():
            if distributed.rank() == 1:
                raise StoppedError(signal.SIGTERM)
            if inner:
                distributed.leave_together()
    except StoppedError as error:
        return error.number
    return 0


@pytest.mark.parametrize("inner", [True, False])
def test_a_signal_to_one_rank_ends_the_block_on_all(run_ranks, inner):
    assert run_ranks(stop, inner) == [signal.SIGTERM, signal.SIGTERM]


def fail_within(failing):
    """An error in a block within another one, whose end another rank has not reached."""
    try:
        with distributed.leaving_together():
            with distributed.leaving_together():
                if distributed.rank() in failing:
                    raise OSError("the disk is full")
            dist.barrier()  # Not of the ranks that have left.
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error), is_known(error)


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_an_error_in_a_block_within_a_block_ends_both_on_all_ranks(run_ranks, failing):
    names = ["OSError" if rank in failing else "LeftTogetherError" for rank in range(2)]
    assert run_ranks(fail_within, failing) == [(name, "the disk is full", True) for name in names]


def fail_on_rank_1():
    if distributed.rank() == 1:
        raise ArithmeticError("rank one is broken")
    dist.barrier()


def die_on_rank_0():
    if distributed.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_nobody():
    if distributed.rank() == 0:
        dist.barrier()
    else:
        signal.pause()


@pytest.mark.slow
def test_the_helper_shows_the_error_of_the_rank_that_failed(run_ranks):
    with pytest.raises(Exception, match=r"(?s)rank .*(rank one is broken|Connection)"):
        run_ranks(fail_on_rank_1)
    assert len(run_ranks(gather, 1)) == 2


@pytest.mark.slow
def test_the_helper_replaces_ranks_that_die_or_hang(run_ranks):
    with pytest.raises(Exception, match="rank 0:\nthe process died"):
        run_ranks(die_on_rank_0)
    with pytest.raises(Exception, match=r"ranks \[0, 1\] did not return"):
        run_ranks(wait_for_nobody, timeout_s=10)
    assert len(run_ranks(gather, 1)) == 2


def made_once(folder, how):
    rank = distributed.rank()

    def make():
        (folder / f"{how}-{rank}").touch()
        if how == "refused":
            raise ValueError("no such set")
        return ShardTable.of([SHARD] * 2000)

    machine = (str(rank) if how == "apart" else "", "")
    loads = walled if how == "walled" else pickle.loads
    # Workers serve other tests after this one.
    with patch.object(distributed, "_machine", lambda: machine), patch.object(distributed.pickle, "loads", loads):
        try:
            return len(distributed.once_per_node(make))
        except ValueError as error:
            return str(error)


def walled(pickled):
    raise PermissionError(13, "no", "/proc/1/fd/3")


@pytest.mark.parametrize(
    ("how", "made"),
    [("together", [0]), ("refused", [0]), ("apart", [0, 1]), ("walled", [0, 1])],
)
def test_once_per_node(run_ranks, tmp_path, how, made):
    found = run_ranks(made_once, tmp_path, how)
    assert found == (["no such set"] * 2 if how == "refused" else [2000, 2000])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{how}-{rank}" for rank in made]


def test_alone_what_is_made_once_is_made_here():
    value = object()
    assert distributed.once_per_node(lambda: value) is value
