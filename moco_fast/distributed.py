"""Collectives of a run; in a single process they behave as in a world of one rank."""

import pickle
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - documented there

from moco_fast.interrupt import StoppedError
from moco_fast.speaking import FailedAloneError, is_known, note_known

__all__ = [
    "LeftTogetherError",
    "StoppedTogetherError",
    "all_gather_rows",
    "average_",
    "broadcast_",
    "exchange_rows",
    "failed_alone",
    "failing_alone",
    "is_distributed",
    "leave_together",
    "leaving_together",
    "once_per_node",
    "rank",
    "ranks_store",
    "sum_over_ranks",
    "tell_all",
    "world_size",
]

T = TypeVar("T")

# The new name in torch 2.13, which deprecates the old one.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_distributed() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in the group (default: the world)."""
    return dist.get_rank(group) if is_distributed() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in the group (default: the world)."""
    return dist.get_world_size(group) if is_distributed() else 1


def tell_all(value: T) -> T:
    """Return the first rank's `value` on every rank; each rank waits for the first one."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


class LeftTogetherError(ValueError):
    """What all ranks raise since one of them cannot go on; its text is that rank's reason."""


class StoppedTogetherError(StoppedError):
    """What all ranks raise since a signal tells one of them to leave."""


def leave_together(reason: str = "", *, stopped_by: int = 0) -> None:
    """Raise on every rank if one of them has a reason to; collective.

    Within `leaving_together`, a rank calls it before each of its other collectives, in which it would wait for one that
    has left.

    Args:
        reason: why this rank cannot go on; empty: it can.
        stopped_by: signal that tells this rank to leave, or 0.

    Raises:
        StoppedTogetherError: with the highest signal of any rank.
        LeftTogetherError: with the reason of the first rank that has one.
    """
    of_ranks = [(reason, stopped_by)]
    if world_size() > 1:
        of_ranks *= world_size()
        dist.all_gather_object(of_ranks, (reason, stopped_by))
    if signal := max(number for _, number in of_ranks):
        stopped = StoppedTogetherError(signal)
        note_known(stopped)
        raise stopped
    if first := next(filter(None, (reason for reason, _ in of_ranks)), ""):
        left = LeftTogetherError(first)
        note_known(left)
        raise left


@contextmanager
def leaving_together() -> Generator[None]:
    """Leave the block on every rank when one raises ValueError, OSError or StoppedError in it; collective at the end.

    Blocks may lie in each other.

    Raises:
        StoppedTogetherError: on every rank, if one of them raised StoppedError.
        LeftTogetherError: on the ranks that did not fail.
    """
    try:
        yield
    except (LeftTogetherError, StoppedTogetherError):
        raise
    except StoppedError as error:
        leave_together(stopped_by=error.number)
    except (ValueError, OSError) as error:
        # Of a block within this one, which all ranks have left.
        if is_known(error):
            raise
        with suppress(LeftTogetherError):
            leave_together(str(error) or type(error).__name__)
        if world_size() > 1:
            note_known(error)
        raise
    leave_together()


def ranks_store() -> Store:
    """Return the store by which the ranks have met; it ends with the process that holds it."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] - there is no other way


_FAILED = "moco_fast/failed"


def failing_alone(reason: str) -> FailedAloneError:
    """Leave word for the other ranks of why this one fails, as they wait for it in collectives; return what to raise.

    They wait until its connections end, as they do at the end of its process.
    """
    store = ranks_store()
    is_first = store.add(f"{_FAILED}/ranks", 1) == 1
    if is_first:
        store.set(f"{_FAILED}/reason", reason)
    return FailedAloneError(reason, is_own=is_first)


def failed_alone() -> FailedAloneError | None:
    """Return what to raise where another rank has left word of why it failed; None: none has."""
    if world_size() == 1:
        return None
    store = ranks_store()
    # The store ends with the process that holds it.
    with suppress(RuntimeError):
        if store.check([f"{_FAILED}/reason"]):
            return FailedAloneError(store.get(f"{_FAILED}/reason").decode(), is_own=False)
    return None


def once_per_node(make: Callable[[], T]) -> T:
    """Call `make` in one process of each machine, and return what it gave in all of that machine's; collective.

    It is pickled on the way, and so is what shards.ground.memory shares. A process that cannot open the memory of
    another, such as one in a container of its own, calls `make` itself.

    Raises:
        ValueError: on every rank, where `make` raises it on one.
    """
    if world_size() == 1:
        return make()
    machines: list[tuple[str, str]] = _gather_objects(_machine())
    first, is_first = machines.index(_machine()), machines.index(_machine()) == rank()
    with leaving_together():
        made = [make()] if is_first else []
    pickled: list[bytes] = _gather_objects(pickle.dumps(made) if is_first else b"")
    # The first one keeps what it made until all others have it.
    with leaving_together():
        if not is_first:
            try:
                made = pickle.loads(pickled[first])  # noqa: S301 - from another rank
            except OSError:
                made = [make()]
    return made[0]


def _machine() -> tuple[str, str]:
    """Return what processes have in common that can open each other's memory: a machine's boot, and its processes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())


def _gather_objects(value: Any) -> list[Any]:
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather (B, ...) of every rank to (W * B, ...), ordered by rank, with gradient. B must be equal on all ranks."""
    return rows if world_size() == 1 else _apply(_AllGatherRows, rows)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        del ctx
        gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
        _all_gather_into(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        # Every rank's loss depends on these rows, so their gradients are summed.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.view(world_size(), -1, *total.shape[1:])[rank()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum every rank's tensor, with gradient: a tensor's gradient is the sum of all ranks' gradients."""
    return values if world_size() == 1 else _apply(_SumOverRanks, values)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def exchange_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Exchange parts of the rows so that part j of rank i becomes part i of rank j: (B, ...) -> (B, ...).

    It is its own inverse. The rows are divided into as many equal parts as the group has ranks. Keeps the memory format
    and propagates gradients; each rank sends (W - 1) / W of its rows' bytes.
    """
    return rows if world_size(group) == 1 else _apply(_ExchangeRows, rows, group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _exchange(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _apply(function: Any, *arguments: Any) -> Tensor:
    """Call an autograd function, whose result type torch does not declare."""
    return function.apply(*arguments)


def _exchange(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    # A channels_last batch is exchanged in its memory layout, with rows outermost.
    channels_last = rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last)
    as_stored = rows.permute(0, 2, 3, 1) if channels_last else rows.contiguous()
    received = torch.empty_like(as_stored)
    dist.all_to_all_single(received, as_stored, group=group)
    return received.permute(0, 3, 1, 2) if channels_last else received


def _flat_collective(tensors: Iterable[Tensor], group: dist.ProcessGroup | None, *, average: bool) -> None:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same_dtype in by_dtype.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same_dtype])
        if average:
            dist.all_reduce(flat, group=group)
            flat /= world_size(group)
        else:
            dist.broadcast(flat, group_src=0, group=group)
        parts = flat.split([tensor.numel() for tensor in same_dtype])
        for tensor, part in zip(same_dtype, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def average_(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each floating-point tensor by its mean over the group's ranks, with one collective per dtype."""
    if world_size(group) > 1:
        _flat_collective(tensors, group, average=True)


def broadcast_(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite each tensor with that of the group's first rank, with one collective per dtype."""
    if world_size(group) > 1:
        _flat_collective(tensors, group, average=False)
