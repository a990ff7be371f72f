"""Command `inspect`: what a set of shards holds, as text and as a sheet of pictures."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.ground.units import counted, format_bytes
from shards.sets.base import ShardSet
from shards.sets.manifest import describe_jpegs
from shards.sets.record import Flag
from shards.sets.shard_file import ShardFile

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
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
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
    columns = _columns(shards)
    width, height = columns["width"].astype(np.float64), columns["height"].astype(np.float64)
    shorter = np.minimum(width, height)
    edges = [0, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 1 << 17]
    yield from _histogram("shorter side in pixels", shorter, edges)
    yield from _histogram(
        "kilobytes", columns["size"] / 1000, [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 1 << 23]
    )
    ratio = np.divide(width, height, out=np.ones_like(width), where=height > 0)
    yield from _histogram("width / height", ratio, [0, 0.25, 0.5, 0.75, 0.95, 1.05, 4 / 3 + 0.01, 2, 4, 1 << 17])
    flags = columns["flags"]
    for flag in Flag:
        count = int(((flags & flag) > 0).sum())
        if flag is not Flag.HAS_MEAN_RGB and count:
            yield f"{(flag.name or '').lower().replace('_', ' ')}: {count:,}"
    yield from _classes(shards, columns["label"])


def _columns(shards: ShardSet) -> dict[str, NDArray[np.int64]]:
    names = ("width", "height", "size", "flags", "label")
    parts = [shards.index(i) for i in range(shards.num_shards)]
    return {name: np.concatenate([part[name].astype(np.int64) for part in parts]) for name in names}


def _histogram(title: str, values: NDArray[np.float64], edges: Sequence[float]) -> Iterator[str]:
    counts, _ = np.histogram(values, bins=edges)
    yield f"{title} (median {np.median(values):.4g})"
    for count, low, high in zip(counts.tolist(), edges, edges[1:], strict=False):
        if count:
            label = f"{low:g} to {high:g}" if high < 1 << 17 else f"{low:g} and more"
            yield f"  {label:>16} {count:>12,} {'#' * max(1, round(_BAR * count / counts.max()))}"


def _classes(shards: ShardSet, labels: NDArray[np.int64]) -> Iterator[str]:
    if not shards.class_names:
        return
    if shards.manifest.has_label_sets:
        sets = np.concatenate([shards.label_sets(shard) for shard in range(shards.num_shards)])
        counts, without = (sets == 1).sum(axis=0), int((~(sets == 1).any(axis=1)).sum())
    else:
        counts = np.bincount(labels[labels >= 0], minlength=len(shards.class_names))
        without = len(labels) - int(counts.sum())
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
    chosen = np.unique(np.linspace(0, shards.num_samples - 1, columns * rows).astype(np.int64))
    starts: list[int] = (np.cumsum(shards.shard_sizes) - shards.shard_sizes).tolist()
    sheet = Image.new("RGB", (columns * _CELL, -(-len(chosen) // columns) * _CELL), "white")
    for cell, dense in enumerate(chosen.tolist()):
        shard = bisect_right(starts, dense) - 1
        record = shards.index(shard)[dense - starts[shard]]
        with _picture(shards.open_shard(shard), record) as image:
            image.thumbnail((_CELL - 4, _CELL - 4))
            left, top = cell % columns * _CELL, cell // columns * _CELL
            sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
    return sheet


def _picture(file: ShardFile, record: Any) -> Image.Image:
    data = np.empty(int(record["size"]), dtype=np.uint8)
    num_read = file.read_into(data, int(record["offset"]))
    try:
        return Image.open(io.BytesIO(data[:num_read].tobytes())).convert("RGB")
    except OSError:
        # Foreign shards may hold what cannot be decoded; the sheet shows that too.
        return Image.new("RGB", (_CELL, _CELL), "red")
