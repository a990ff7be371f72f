"""Command `summary`: what a set of shards holds, and what was left out of it, as one page that needs nothing else."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from shards.ground.arrays import Indices
from shards.ground.files import write_whole
from shards.ground.progress import ProgressBars
from shards.sets.base import ShardSet
from shards.sets.registry import open_set
from shards.storage.file_kinds import REJECTED_NAME, SUMMARY_NAME
from shards.storage.stores import is_url
from shards.tools.figures import bytes_of, class_counts, columns_of, evenly_spread, histograms, place_of
from shards.tools.near_duplicates import near_duplicates
from shards.tools.summary_page import CaptionedPicture, ClassShare, DuplicateGroup, RejectedGroup, SummaryFacts, page_of
from shards.tools.thumbnails import original_bytes, thumbnail

__all__ = ["write_summary"]

_NUM_SAMPLES = 24
_EXAMPLES = 12
_MOST_GROUPS = 20
_OF_A_GROUP = 6
_MOST_CLASSES = 40
_SIDE = 128


def write_summary(
    where: str,
    out: str | None = None,
    *,
    with_near_duplicates: bool = False,
    workers: int = 1,
    progress: ProgressBars | None = None,
) -> Path:
    """Write a page about a set: samples, sizes, shapes, formats, labels, and what was rejected, with pictures.

        from shards.tools.summary import write_summary

        write_summary("packed", "packed.html")

    Pictures of rejected inputs are made from the originals where these are still on this machine.

    Args:
        where: the set: folder or address.
        out: the page; None: summary.html in the set's folder.
        with_near_duplicates: look for images that are almost the same, which decodes all of them at an eighth.
        workers: processes for that.
        progress: shows how far that is.

    Returns:
        the page.

    Raises:
        ValueError: there is no such set.
        OSError: a shard cannot be read, or the page not be written.
    """
    if out is None and (is_url(where) or not Path(where).is_dir()):
        raise ValueError(f"{where} is not a folder on this machine: say where the page goes with --file")
    shards = open_set(where)
    progress = progress or ProgressBars(enabled=False)
    groups = near_duplicates(shards, workers=workers, progress=progress) if with_near_duplicates else None
    page = page_of(_facts(shards, where, groups))
    path = Path(where) / SUMMARY_NAME if out is None else Path(out)
    write_whole(path, page, durable=False)
    return path


def _facts(shards: ShardSet, where: str, groups: list[Indices] | None) -> SummaryFacts:
    has_samples = bool(shards.num_samples)
    columns = columns_of(shards) if has_samples else {}
    classes, num_unlabeled = _classes(shards, columns["label"]) if has_samples else ([], 0)
    rejected = list(_rejected(shards))
    return SummaryFacts(
        where=where,
        manifest=shards.manifest,
        histograms=histograms(columns) if has_samples else [],
        classes=classes,
        num_unlabeled=num_unlabeled,
        samples=[_picture(shards, sample) for sample in (evenly_spread(shards, _NUM_SAMPLES) if has_samples else [])],
        rejected=rejected,
        duplicates=None if groups is None else list(_duplicates(shards, groups)),
        num_duplicate_groups=len(groups or ()),
        num_in_groups=sum(len(group) for group in groups or ()),
    )


def _picture(shards: ShardSet, sample: int) -> CaptionedPicture:
    return CaptionedPicture(
        url=thumbnail(bytes_of(shards, sample), _SIDE), title=f"sample {sample:,}", below=_class_of(shards, sample)
    )


def _class_of(shards: ShardSet, sample: int) -> str:
    shard, row = place_of(shards, sample)
    if shards.manifest.has_label_sets:
        present: list[int] = np.flatnonzero(shards.label_sets(shard)[row] == 1).tolist()
        return ", ".join(shards.class_names[number] for number in present)
    label = int(shards.index(shard)["label"][row])
    return shards.class_names[label] if label >= 0 and shards.class_names else ""


def _classes(shards: ShardSet, labels: Indices) -> tuple[list[ClassShare], int]:
    """Return the largest and the smallest classes, by size, and how many samples have no class."""
    if not shards.class_names:
        return [], 0
    counts, without = class_counts(shards, labels)
    order: list[int] = (-counts).argsort(kind="stable").tolist()
    half = _MOST_CLASSES // 2
    shown = order if len(order) <= _MOST_CLASSES else [*order[:half], *order[-half:]]
    return [
        ClassShare(name=shards.class_names[n], num_samples=int(counts[n]), rank=order.index(n) + 1) for n in shown
    ], without


def _rejected(shards: ShardSet) -> Iterator[RejectedGroup]:
    lines: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    text = b""
    # A set in one file has counts, but no list.
    with suppress(ValueError):
        text = shards.read_beside(REJECTED_NAME) if shards.manifest.rejections else b""
    for line in text.decode().splitlines():
        values = json.loads(line)
        if len(lines[values["reason"]]) < _EXAMPLES:
            lines[values["reason"]].append(values)
    # Duplicates are among the samples.
    wanted = [line["source"] for reason, some in lines.items() if reason != "duplicate" for line in some]
    originals = original_bytes(wanted)
    for reason, count in sorted(shards.manifest.rejections.items(), key=lambda each: -each[1]):
        examples = [
            CaptionedPicture(
                url=thumbnail(originals[line["source"]], _SIDE) if line["source"] in originals else None,
                title=line["source"],
                below=line["detail"],
            )
            for line in lines[reason]
        ]
        yield RejectedGroup(reason=reason, count=count, examples=examples)


def _duplicates(shards: ShardSet, groups: Sequence[Indices]) -> Iterator[DuplicateGroup]:
    for group in groups[:_MOST_GROUPS]:
        pictures = [_picture(shards, sample) for sample in group[:_OF_A_GROUP].tolist()]
        yield DuplicateGroup(count=len(group), pictures=pictures)
