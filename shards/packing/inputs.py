"""Inputs of a plan, read one after the other from local files, and many at a time over a network."""

from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

from shards.ground.errors import Rejected
from shards.ground.threads import mapped
from shards.packing.plan import PackPlan, PlanRows
from shards.sources import Source

__all__ = ["ReadInput", "read_inputs"]

_THREADS = 16
_AHEAD = 48


class ReadInput(NamedTuple):
    """An input, with its bytes or why they cannot be had."""

    source: Source
    name: bytes
    label: int
    data: bytes | Rejected


def _read(source: Source, name: bytes, offset: int, size: int) -> bytes | Rejected:
    try:
        return source.read(name, offset, size)
    except Rejected as rejected:
        return rejected


def read_inputs(plan: PackPlan, rows: PlanRows) -> Generator[ReadInput]:
    """Read some rows of a plan, in their order."""
    listing = plan.inputs(rows)
    if not plan.is_remote:
        for source, name, offset, size, label in listing:
            yield ReadInput(source, name, label, _read(source, name, offset, size))
        return

    def read(item: tuple[Source, bytes, int, int, int]) -> bytes | Rejected:
        source, name, offset, size, _ = item
        return _read(source, name, offset, size)

    with closing(mapped(read, listing, threads=_THREADS, ahead=_AHEAD)) as results:
        for (source, name, _, _, label), data in results:
            yield ReadInput(source, name, label, data)
