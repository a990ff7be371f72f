"""Command `inspect`: what a set of shards holds, as text and as a sheet of pictures."""

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.ground.units import counted, format_bytes
from shards.sets.base import ShardSet
from shards.sets.manifest import describe_jpegs
from shards.sets.record import Flag
from shards.tools.figures import bytes_of, class_counts, columns_of, evenly_spread, histograms

__all__ = ["contact_sheet", "describe"]

_BAR = 40
_CELL = 128
_MOST_CLASSES = 10


def describe(shards: ShardSet, *, where: str | None = None) -> Iterator[str]:
    """Return counts, histograms of size and shape, class balance, what was changed and rejected; line by line.

    Args:
        shards: the set; only its indexes are read.
        where: what to call it; None: where it is.
    """
    manifest = shards.manifest
    num_bytes = int(manifest.shards.num_bytes.sum())
    size = (
        f"{counted(shards.num_samples, 'sample')} in {counted(shards.num_shards, 'shard')}, {format_bytes(num_bytes)}"
    )
    yield f"{where or shards.where}: {size}"
    for title, tally in (
        ("packed", manifest.outcomes),
        ("rejected", manifest.rejections),
        ("left aside", manifest.left_aside),
    ):
        if tally:
            yield f"{title}: " + ", ".join(f"{what} {count:,}" for what, count in tally.items())
    if not shards.num_samples:
        return
    yield describe_jpegs(manifest)
    columns = columns_of(shards)
    for histogram in histograms(columns):
        yield f"{histogram.title} (median {histogram.median:.4g})"
        most = max(count for _, count in histogram.bins)
        for label, count in histogram.bins:
            yield f"  {label:>16} {count:>12,} {'#' * max(1, round(_BAR * count / most))}"
    flags = columns["flags"]
    for flag in Flag:
        count = int(((flags & flag) > 0).sum())
        if flag is not Flag.HAS_MEAN_RGB and count:
            yield f"{(flag.name or '').lower().replace('_', ' ')}: {count:,}"
    yield from _classes(shards, columns["label"])


def _classes(shards: ShardSet, labels: NDArray[np.int64]) -> Iterator[str]:
    if not shards.class_names:
        return
    counts, without = class_counts(shards, labels)
    yield f"classes: {len(counts):,}, of {counts.min():,} to {counts.max():,} samples; {without:,} samples have none"
    order = np.argsort(-counts, kind="stable").tolist()
    shown = order if len(order) <= _MOST_CLASSES else [*order[: _MOST_CLASSES // 2], *order[-_MOST_CLASSES // 2 :]]
    for number in shown:
        yield f"  {shards.class_names[number]:>16.40} {counts[number]:>12,}"


def contact_sheet(shards: ShardSet, *, columns: int = 8, rows: int = 5) -> Image.Image:
    """Draw samples that are evenly spread over the set, one cell each.

    Args:
        shards: the set.
        columns: cells in a row.
        rows: of cells.

    Raises:
        ValueError: the set is empty.
        OSError: a shard cannot be read.
    """
    if not shards.num_samples:
        raise ValueError(f"{shards.where} holds no samples: there is nothing to show")
    chosen = evenly_spread(shards, columns * rows)
    sheet = Image.new("RGB", (columns * _CELL, -(-len(chosen) // columns) * _CELL), "white")
    for cell, dense in enumerate(chosen):
        with _picture(bytes_of(shards, dense)) as image:
            image.thumbnail((_CELL - 4, _CELL - 4))
            left, top = cell % columns * _CELL, cell // columns * _CELL
            sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
    return sheet


def _picture(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:
        # Foreign shards may hold what cannot be decoded; the sheet shows that too.
        return Image.new("RGB", (_CELL, _CELL), "red")
