"""Preview of chosen samples: their views exactly as training sees them, and a sheet of them to look at."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipelines.config import Backend, ViewsConfig, ViewSpec
from pipelines.loader import make_views, specs_of
from pipelines.plan.draw import draw_views
from pipelines.reading.reader import Reader
from shards.ground.arrays import Pixels
from shards.sets import ShardSet

__all__ = ["SampleViews", "differences", "draw", "sheet"]


# One level of difference is too dark to see.
_AMPLIFY = 16
# One for each view; a recipe with more of them begins again.
_COLORS = ((230, 85, 13), (33, 113, 181), (49, 163, 84), (117, 107, 177))


@dataclass(frozen=True, kw_only=True)
class SampleViews:
    """A sample and its views."""

    index: int
    """Dense sample number."""
    original: Pixels
    """(H, W, 3) as stored."""
    boxes: tuple[tuple[int, int, int, int], ...]
    """Crop of each view in the original: x, y, width, height in pixels."""
    views: tuple[Pixels, ...]
    """(S, S, 3) each."""


def draw(
    shards: ShardSet,
    views: ViewsConfig | Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    indices: Sequence[int],
    backend: Literal["auto", Backend] = "dali",
) -> list[SampleViews]:
    """Make the views of some samples as a run with this seed sees them in this epoch.

    Args:
        shards: the set.
        views: the recipe, or views one by one.
        seed: of the run.
        epoch: of the run.
        indices: dense sample numbers.
        backend: what makes the views.

    Raises:
        ValueError: a sample that is not in the set.
    """
    samples = np.asarray(indices, dtype=np.int64)
    if samples.size and not 0 <= samples.min() <= samples.max() < shards.num_samples:
        raise ValueError(f"indices reach beyond the {shards.num_samples} samples of {shards.where}")
    reader = Reader(shards, num_threads=1)
    try:
        records = reader.records(samples)
        encoded = reader.submit(samples, records).result()
    finally:
        reader.close()
    tables = draw_views(epoch, samples, records, views=specs_of(views), seed=seed)
    made = make_views(shards, samples, views, seed=seed, epoch=epoch, backend=backend)
    pixels = [view.permute(0, 2, 3, 1).numpy() for view in made]
    return [
        SampleViews(
            index=int(sample),
            original=np.asarray(Image.open(io.BytesIO(encoded[row].tobytes())).convert("RGB")),
            boxes=tuple(_as_box(table.box[row]) for table in tables),
            views=tuple(of_view[row].copy() for of_view in pixels),
        )
        for row, sample in enumerate(samples)
    ]


def differences(previews: Sequence[SampleViews], others: Sequence[SampleViews]) -> list[Pixels]:
    """Return how far two backends' views of the same samples are apart in 8-bit levels: (n, S, S, 3) for each view."""
    one, two = (zip(*(preview.views for preview in some), strict=True) for some in (previews, others))
    apart = [np.abs(np.array(a, dtype=np.int16) - np.array(b, dtype=np.int16)) for a, b in zip(one, two, strict=True)]
    return [of_view.astype(np.uint8) for of_view in apart]


def sheet(
    previews: Sequence[SampleViews], others: Sequence[SampleViews] = (), *, side: int = 160, columns: int = 3
) -> Image.Image:
    """Lay samples out on one sheet: the original with all crops outlined, then each view.

    Args:
        previews: what to show.
        others: the same samples by another backend: each view is followed by 16 times its difference.
        side: of a tile in pixels.
        columns: samples side by side.
    """
    margin = 8
    apart = differences(previews, others) if others else None
    num_views = len(previews[0].views)
    rows, tiles = -(-len(previews) // columns), 1 + (2 if others else 1) * num_views
    cell_w, cell_h = tiles * side + (tiles + 1) * margin, side + margin
    canvas = Image.new("RGB", (columns * cell_w, rows * cell_h + margin), (255, 255, 255))
    for number, preview in enumerate(previews):
        shown = [_outlined(preview, side)]
        for view, (pixels, color) in enumerate(zip(preview.views, cycle(_COLORS))):
            shown.append(_framed(pixels, side, color))
            if apart is not None:
                amplified = (apart[view][number].astype(np.uint16) * _AMPLIFY).clip(0, 255).astype(np.uint8)
                shown.append(_framed(amplified, side, color))
        left, top = number % columns * cell_w + margin, number // columns * cell_h + margin
        for place, tile in enumerate(shown):
            canvas.paste(tile, (left + place * (side + margin), top))
    return canvas


def _framed(pixels: Pixels, side: int, color: tuple[int, int, int]) -> Image.Image:
    tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    ImageDraw.Draw(tile).rectangle((0, 0, side - 1, side - 1), outline=color, width=2)
    return tile


def _outlined(preview: SampleViews, side: int) -> Image.Image:
    """Fit the original into a square tile, with both boxes drawn on it."""
    height, width = preview.original.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(preview.original).resize(size, Image.Resampling.BILINEAR)
    tile = Image.new("RGB", (side, side), (240, 240, 240))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    tile.paste(small, (left, top))
    pen = ImageDraw.Draw(tile)
    for (x, y, w, h), color in reversed(list(zip(preview.boxes, cycle(_COLORS)))):
        corners = (left + x * scale, top + y * scale, left + (x + w) * scale - 1, top + (y + h) * scale - 1)
        pen.rectangle((*corners[:2], max(corners[0], corners[2]), max(corners[1], corners[3])), outline=color, width=2)
    return tile


def _as_box(row: npt.NDArray[np.int32]) -> tuple[int, int, int, int]:
    x, y, w, h = row.tolist()
    return x, y, w, h
