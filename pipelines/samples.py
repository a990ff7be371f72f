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

__all__ = ["Draw", "EncodedBatch", "draw_central", "draw_training", "encoded_batches", "plan_steps"]

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


def draw_training(
    epoch: int, samples: Indices, records: npt.NDArray[np.void], *, views: ViewsConfig, seed: int
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


def draw_central(_epoch: int, _samples: Indices, records: npt.NDArray[np.void], *, crop: float) -> tuple[ViewTable]:
    """Cut the central square of side `crop` times the shorter side, and do nothing else."""
    width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
    side = np.maximum(1, np.rint(crop * np.minimum(width, height)).astype(np.int64))
    num = len(side)
    identity = np.concatenate((np.eye(3), np.zeros((3, 1))), axis=1)
    table = ViewTable(
        box=np.stack(((width - side) // 2, (height - side) // 2, side, side), axis=1).astype(np.int32),
        flip=np.zeros(num, dtype=np.bool_),
        sigma=np.zeros(num, dtype=np.float32),
        matrix=np.broadcast_to(identity.astype(np.float32), (num, 3, 4)),
        solarize=np.zeros(num, dtype=np.bool_),
        factors=np.broadcast_to(np.array([1.0, 1.0, 1.0, 0.0]), (num, 4)),
        jitter_order=np.broadcast_to(np.arange(4), (num, 4)),
        grayscale=np.zeros(num, dtype=np.bool_),
    )
    return (table,)


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
