"""Page of what stands out in a set of images: near-duplicates, outliers, suspicious labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from moco_fast.embedding.explore import Explored
from moco_fast.embedding.index import Index, Row
from moco_fast.methods.base import Level
from moco_fast.report.figures import draw_histogram
from moco_fast.report.report import DrawnChart, open_template
from moco_fast.report.rows import row_pictures
from moco_fast.report.words import Tile
from shards.ground.files import write_whole

__all__ = ["write_page"]

_OF_GROUP = 8  # pictures
_OF_LABEL = 5
_BINS = 40


@dataclass(frozen=True, kw_only=True)
class _ShownRow:
    """A row with its figure."""

    row: int
    similarity: float
    stays: bool = False


@dataclass(frozen=True, kw_only=True)
class _ShownGroup:
    size: int
    rows: list[_ShownRow]


@dataclass(frozen=True, kw_only=True)
class _ShownLabel:
    row: int
    says: str
    """The label that the neighbors share."""
    share: float
    neighbors: list[_ShownRow]


def write_page(
    out: Path, index: Index, explored: Explored, *, num_shown: int, lists: Sequence[str], keep: str, note: str = ""
) -> None:
    """Write a page that needs nothing else. A picture that cannot be shown is a blank with its name.

    Args:
        out: file to write.
        index: that was explored.
        explored: what was found.
        num_shown: groups, outliers and labels that are shown, each.
        lists: names of the lists beside the page.
        keep: why there is no list of what to keep; empty if there is one.
        note: what there is to say about how neighbors were found.
    """
    groups = _groups(explored, num_shown)
    likeness = explored.likeness
    outliers = [_ShownRow(row=row, similarity=float(likeness[row])) for row in explored.outliers[:num_shown].tolist()]
    suspicious = _suspicious(index, explored, num_shown)
    shown = [each.row for group in groups for each in group.rows] + [each.row for each in outliers]
    shown += [row for each in suspicious for row in (each.row, *(near.row for near in each.neighbors))]
    numbers = sorted(set(shown))
    rows: dict[int, Row] = dict(zip(numbers, index.rows(numbers), strict=True))
    pictures, missing = row_pictures(index, list(rows.values()))
    page = open_template("explore.html").render(
        index=index,
        explored=explored,
        k=explored.neighbors.rows.shape[1],
        tiles=_tiles(explored),
        charts=[_chart(explored)],
        groups=groups,
        outliers=outliers,
        suspicious=suspicious,
        rows=rows,
        pictures=pictures,
        missing=missing,
        note=note,
        lists=lists,
        keep=keep,
    )
    write_whole(out, page, durable=False)


def _groups(explored: Explored, num_shown: int) -> list[_ShownGroup]:
    """Return the largest groups with their first members, each with its likeness to the one that would stay instead."""
    near, found = explored.neighbors.duplicates, list[_ShownGroup]()
    for first in explored.groups[:num_shown].tolist():
        members = np.flatnonzero(explored.group == first)[:_OF_GROUP].tolist()
        rows = [
            _ShownRow(row=row, similarity=float(near.similarity[row]), stays=near.stays[row] == row) for row in members
        ]
        found.append(_ShownGroup(size=int(explored.group_sizes[first]), rows=rows))
    return found


def _suspicious(index: Index, explored: Explored, num_shown: int) -> list[_ShownLabel]:
    names = index.header["class_names"]
    found: list[_ShownLabel] = []
    for row in explored.suspicious[:num_shown].tolist():
        label = int(explored.majority[row])
        near = explored.neighbors.rows[row, :_OF_LABEL].tolist()
        similarities = explored.neighbors.similarities[row, :_OF_LABEL].tolist()
        found.append(
            _ShownLabel(
                row=row,
                says=names[label] if label < len(names) else f"class {label}",
                share=float(explored.share[row]),
                neighbors=[_ShownRow(row=each, similarity=s) for each, s in zip(near, similarities, strict=True)],
            )
        )
    return found


def _tiles(explored: Explored) -> list[Tile]:
    total, members = len(explored), len(explored.duplicates)
    groups, drop = len(explored.groups), len(explored.dropped)
    nearest = explored.neighbors.similarities[:, 0]
    found = [
        Tile(name="Images", value=f"{total:,}", note=f"nearest neighbor: median similarity {nearest.median():.3f}"),
        Tile(
            name="Near-duplicates",
            value=f"{drop:,}",
            note=f"could be dropped ({drop / total:.1%}): {members:,} images in {groups:,} groups",
        ),
        Tile(
            name="Most isolated",
            value=f"{explored.likeness.min():.3f}",
            note=f"mean similarity to its neighbors; median image {np.median(explored.likeness):.3f}",
        ),
    ]
    labeled = int((explored.labels >= 0).sum())
    if labeled:
        suspicious = len(explored.suspicious)
        note = f"of {labeled:,} ({suspicious / labeled:.1%}): most neighbors share another"
        found.append(Tile(name="Suspicious labels", value=f"{suspicious:,}", note=note))
    return found


def _chart(explored: Explored) -> DrawnChart:
    nearest = explored.neighbors.similarities[:, 0].numpy()
    low = min(float(nearest.min()), explored.threshold)
    counts, edges = np.histogram(nearest.clip(max=1), bins=_BINS, range=(low, max(1.0, low + 1e-6)))
    mark = Level(value=explored.threshold, label=f"threshold {explored.threshold:g}")
    svg = draw_histogram(
        counts.tolist(), edges.tolist(), alt="Images by similarity to their nearest neighbor", mark=mark
    )
    return DrawnChart(
        title="Similarity to the nearest neighbor",
        caption="Number of images. A bump at the right end is near-duplicates: put --threshold where it begins.",
        svg=Markup(svg),  # noqa: S704 - figures.py and matplotlib escape text
    )
