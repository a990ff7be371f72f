"""Views of samples as tables of parameters: what a loader's views are made from, whatever makes them."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pipelines.config import Color, FixedCrop, ViewConfig, ViewSpec
from pipelines.plan.augment import ViewTable, table_of, view_numbers
from shards.ground.arrays import Indices, Records
from shards.sets.record import Flag

__all__ = ["Draw", "draw_views"]


Draw = Callable[[int | Indices, Indices, Records], tuple[ViewTable, ...]]
"""Gives the views' tables from (epoch, samples, records)."""


def draw_views(
    epoch: int | Indices, samples: Indices, records: Records, *, views: Sequence[ViewSpec], seed: int
) -> tuple[ViewTable, ...]:
    """Draw all views of n samples. A view's number is its place in `views`; its random numbers follow from that.

    Args:
        epoch: that of all, or (n,).
        samples: (n,) dense sample numbers.
        records: (n,) of shards.sets.record.RECORD.
        views: what to make of each sample.
        seed: 0 to 2**64 - 1.
    """
    width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
    tables: dict[int, ViewTable] = {}
    by_recipe: dict[tuple[ViewConfig, Color], list[int]] = {}
    for number, view in enumerate(views):
        if isinstance(view.recipe, FixedCrop):
            tables[number] = _fixed(view.recipe, width, height)
        else:
            by_recipe.setdefault((view.recipe, view.color), []).append(number)
    if by_recipe:
        mean_rgb = _mean_rgb(records) if any(color == "linear" for _, color in by_recipe) else None
        numbers = [number for of_recipe in by_recipe.values() for number in of_recipe]
        u = view_numbers(
            seed=seed,
            epoch=np.tile(np.broadcast_to(epoch, len(samples)), len(numbers)),
            view=np.repeat(numbers, len(samples)),
            index=np.tile(samples, len(numbers)),
        )
        tables |= _drawn(by_recipe, u, width, height, mean_rgb)
    return tuple(tables[number] for number in range(len(views)))


def _drawn(
    by_recipe: dict[tuple[ViewConfig, Color], list[int]],
    u: npt.NDArray[np.float64],
    width: Indices,
    height: Indices,
    mean_rgb: npt.NDArray[np.float64] | None,
) -> dict[int, ViewTable]:
    """Turn the random numbers of all views, recipe after recipe, into tables: views of one recipe in one call.

    On a few samples numpy takes its time by the call, so the numbers of all recipes come from one as well.
    """
    tables: dict[int, ViewTable] = {}
    num_samples = len(width)
    for (recipe, color), numbers in by_recipe.items():
        num = len(numbers)
        together = table_of(
            recipe,
            u[: num * num_samples],
            width=np.tile(width, num),
            height=np.tile(height, num),
            mean_rgb=np.tile(mean_rgb, (num, 1)) if mean_rgb is not None and color == "linear" else None,
        )
        u = u[num * num_samples :]
        for place, number in enumerate(numbers):
            tables[number] = together.rows(slice(place * num_samples, (place + 1) * num_samples))
    return tables


def _mean_rgb(records: Records) -> npt.NDArray[np.float64]:
    known = (records["flags"] & Flag.HAS_MEAN_RGB) != 0
    return np.where(known[:, None], records["mean_rgb"], 128).astype(np.float64)


def _fixed(crop: FixedCrop, width: Indices, height: Indices) -> ViewTable:
    """Cut the same square out of every image, and do nothing else but mirror it."""
    side = np.maximum(1, np.rint(crop.side * np.minimum(width, height)).astype(np.int64))
    x, y = (np.floor(share * (length - side)) for share, length in ((crop.x, width), (crop.y, height)))
    num = len(side)
    return ViewTable(
        box=np.stack((x, y, side, side), axis=1).astype(np.int32),
        flip=np.full(num, crop.flip),
        sigma=np.zeros(num, dtype=np.float32),
        factors=np.broadcast_to(np.array([1.0, 1.0, 1.0, 0.0]), (num, 4)),
        jitter_order=np.broadcast_to(np.arange(4), (num, 4)),
        grayscale=np.zeros(num, dtype=np.bool_),
        grayscale_first=False,
        matrix=None,
        solarize=np.zeros(num, dtype=np.bool_),
    )
