"""Exchange of a few bytes between the ranks' hosts, beside the step: over gloo, or their store where gloo fails.

Gloo connects every rank with every other by addresses that it chooses by itself. A run whose steps use NCCL must not
end because these lead nowhere. Gloo comes first since it notices at once when another rank is gone; the store, only
after the time-out.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented there

from moco_fast.distributed import ranks_store

__all__ = ["CONNECTING_S", "HostExchange", "open_exchange"]

CONNECTING_S = 60.0
"""For gloo to connect all ranks, before the store takes its place."""
_ONE_SAYS = 1 << 32
"""What a rank that has something to say adds to a count of ranks."""


class HostExchange(Protocol):
    """Collectives on the host, which all ranks begin in one order; of each kind, one at a time is under way."""

    name: str
    """The same on all ranks, of no other exchange of this process group."""
    note: str | None
    """A line for the user: how the exchange is made; None: as usual."""

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the largest of all ranks' values, each 0 or above, by place; return what waits for them.

        Raises:
            RuntimeError: by what waits, too: another rank is gone or does not answer.
        """
        ...

    def begin_gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        """Begin to bring every rank's tensor to the first one; return what waits for them.

        It returns them on the first rank, none on others. It may be called by
        several threads, and until the one after the next begins.

        Args:
            own: (N,) uint8 on the host, of one length on all ranks.

        Raises:
            RuntimeError: by what waits, too: another rank is gone or does not answer.
        """
        ...


def open_exchange(*, timeout_s: float) -> HostExchange:
    """Connect all ranks of the world; collective.

    Args:
        timeout_s: seconds that ranks wait for each other.

    Raises:
        RuntimeError: another rank is gone or does not answer.
    """
    store = _own_connection(timeout_s)
    name = str(store.add(f"opened-by-{dist.get_rank()}", 1))
    # One that failed is not tried again: each try takes as long as gloo has time to connect.
    if store.check(["no-gloo"]):
        return _OverStore(name, store)
    group, reason = _connect_gloo(timeout_s)
    if any_reason := _agree(PrefixStore(f"agreement/{name}", store), reason):
        store.set("no-gloo", "")
        return _OverStore(name, store, note=_NOTE.format(reason=any_reason))
    assert group is not None
    return _OverGloo(name, group, timedelta(seconds=timeout_s))


_NOTE = (
    "network: gloo cannot connect the ranks ({reason}): they agree on stopping over their store, where a lost rank is "
    "noticed only after --run.timeout-s; GLOO_SOCKET_IFNAME names the network that the nodes share"
)


def _own_connection(timeout_s: float) -> Store:
    """Return the ranks' store by a connection on which no other thread waits, under names of the exchange's own."""
    own = PrefixStore("moco_fast/host_exchange", ranks_store().clone())
    own.set_timeout(timedelta(seconds=timeout_s))
    return own


def _connect_gloo(timeout_s: float) -> tuple[dist.ProcessGroup | None, str]:
    """Return a gloo group of all ranks, or why this one has none."""
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=min(timeout_s, CONNECTING_S)))
    except RuntimeError as error:
        return None, " ".join(str(error).split())[:200] or type(error).__name__
    # new_group returns a number to ranks outside the group, but this group contains all ranks.
    assert isinstance(group, dist.ProcessGroup)
    return group, ""


def _agree(store: Store, reason: str) -> str:
    """Return a reason of any rank that has one; collective, once under a store's prefix."""
    if reason:
        store.set("reason", f"rank {dist.get_rank()}: {reason}")
    total = store.add("ranks", 1 + (_ONE_SAYS if reason else 0))
    if total % _ONE_SAYS == dist.get_world_size():
        store.set("done", store.get("reason").decode() if total >= _ONE_SAYS else "")
    return store.get("done").decode()


class _OverGloo:
    """Gloo's own collectives; those of one kind are in one order on all ranks."""

    note: str | None = None

    def __init__(self, name: str, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.name, self._group, self._timeout = name, group, timeout

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        agreed = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.MAX, self._timeout
        work = self._group.allreduce([agreed], options)

        def wait() -> list[int]:
            work.wait()
            return agreed.tolist()

        return wait

    def begin_gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        world_size = dist.get_world_size()
        of_ranks = [torch.empty_like(own) for _ in range(world_size)] if dist.get_rank() == 0 else []
        options = dist.GatherOptions()
        options.rootRank, options.timeout = 0, self._timeout
        work = self._group.gather([of_ranks] if of_ranks else [], [own], options)

        def wait() -> list[Tensor]:
            work.wait()
            return of_ranks

        return wait


class _OverStore:
    """Keys in the store of the first rank: two requests of some bytes from each rank for a collective."""

    def __init__(self, name: str, store: Store, *, note: str | None = None) -> None:
        self.name, self.note, self._store = name, note, PrefixStore(f"exchange/{name}", store)
        self._num_max = self._num_gathers = 0

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        number, self._num_max = self._num_max, self._num_max + 1
        key, num_values = f"max/{number}", len(values)
        if any(values):
            self._store.set(f"{key}/of-{dist.get_rank()}", " ".join(map(str, values)))
        total = self._store.add(key, 1 + (_ONE_SAYS if any(values) else 0))
        if total % _ONE_SAYS == dist.get_world_size():
            self._tell(number, num_values, anyone_says=total >= _ONE_SAYS)

        def wait() -> list[int]:
            return [int(value) for value in self._store.get(f"{key}/done").split()]

        return wait

    def _tell(self, number: int, num_values: int, *, anyone_says: bool) -> None:
        """Let the last rank to begin say what all ranks' values are."""
        key = f"max/{number}"
        ranks = range(dist.get_world_size()) if anyone_says else range(0)
        said = [f"{key}/of-{rank}" for rank in ranks if self._store.check([f"{key}/of-{rank}"])]
        rows = [[int(value) for value in self._store.get(name).split()] for name in said]
        largest = [max(place) for place in zip([0] * num_values, *rows, strict=True)]
        self._store.set(f"{key}/done", " ".join(map(str, largest)))
        # All ranks have begun this one, so they have read what was told of the one before.
        for name in (*said, key, *([f"max/{number - 1}/done"] if number else [])):
            self._store.delete_key(name)

    def begin_gather(self, own: Tensor) -> Callable[[], list[Tensor]]:
        number, self._num_gathers = self._num_gathers, self._num_gathers + 1
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        self._store.set(f"gather/{number}/{rank}", own.numpy().tobytes())  # pyright: ignore[reportArgumentType] - bytes
        # What waits for the one before may still be called, in another thread.
        self._store.delete_key(f"gather/{number - 2}/{rank}")

        def wait() -> list[Tensor]:
            of_ranks = [self._store.get(f"gather/{number}/{each}") for each in ranks if rank == 0]
            return [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in of_ranks]

        return wait
