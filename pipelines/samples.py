"""The samples of a rank, step after step and epoch after epoch: order, parameters and encoded bytes, read ahead."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.augment import KEY_VIEW, QUERY_VIEW, ViewTable, draw_view
from pipelines.config import ViewConfig, ViewsConfig
from pipelines.order import EpochOrder, OrderPlan
from pipelines.reader import PendingBytes, Reader
from shards.index import Flag

__all__ = ["EncodedBatch", "draw_views", "encoded_batches", "plan_steps"]

Indices = npt.NDArray[np.int64]
Draw = Callable[[int, Indices, npt.NDArray[np.void]], tuple[ViewTable, ...]]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A rank's share of a step before decoding."""

    samples: Indices
    """(B,) dense sample numbers."""
    labels: Indices
    """(B,), -1 where there is none."""
    encoded: list[npt.NDArray[np.uint8]]
    """B encoded images."""
    tables: tuple[ViewTable, ...]
    """What is done to each view."""


def plan_steps(plan: OrderPlan, *, epoch: int, step: int, rank: int, world_size: int) -> Iterator[tuple[int, Indices]]:
    """Give (epoch, a rank's dense sample numbers) from a place on, over the epochs' ends, for ever."""
    while True:
        order = EpochOrder(plan, epoch)
        for at in range(step, plan.num_steps):
            yield epoch, order.rank_step(at, rank, world_size)
        epoch, step = epoch + 1, 0


def draw_views(
    views: ViewsConfig, samples: Indices, records: npt.NDArray[np.void], *, seed: int, epoch: int
) -> tuple[ViewTable, ViewTable]:
    """Draw both views of samples whose index records are given."""
    known = (records["flags"] & Flag.HAS_MEAN_RGB) != 0
    mean_rgb = np.where(known[:, None], records["mean_rgb"], 128).astype(np.float64)

    def draw(config: ViewConfig, view: int) -> ViewTable:
        return draw_view(
            config,
            seed=seed,
            epoch=epoch,
            view=view,
            index=samples,
            width=records["width"].astype(np.int64),
            height=records["height"].astype(np.int64),
            mean_rgb=mean_rgb,
        )

    return draw(views.query, QUERY_VIEW), draw(views.key, KEY_VIEW)


def encoded_batches(
    reader: Reader, steps: Iterator[tuple[int, Indices]], *, ahead: int, draw: Draw
) -> Iterator[EncodedBatch]:
    """Read batches in the order of `steps`, with `ahead` more of them under way.

    `draw` gives the views' tables from (epoch, samples, records).
    """
    waiting: deque[tuple[Indices, npt.NDArray[np.void], tuple[ViewTable, ...], PendingBytes]] = deque()
    for epoch, samples in steps:
        records = reader.records(samples)
        pending = reader.submit(samples, records)
        waiting.append((samples, records, draw(epoch, samples, records), pending))
        if len(waiting) > ahead:
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


def _finish(
    samples: Indices, records: npt.NDArray[np.void], tables: tuple[ViewTable, ...], pending: PendingBytes
) -> EncodedBatch:
    return EncodedBatch(
        samples=samples, labels=records["label"].astype(np.int64), encoded=pending.result(), tables=tables
    )
