"""Kinds of JPEG in a finished set, counted from the images' headers: for sets of versions that did not note them."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from shards.config import WORK_FOLDER
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.images.jpeg import JpegError, is_jpeg, parse_jpeg
from shards.sets.base import ShardSet
from shards.sets.manifest import Manifest, ShardTable
from shards.sets.registry import open_set
from shards.sets.shard_folder import ShardFolder

__all__ = ["KindsOf", "note_kinds"]

# A header is rarely longer; if it is (color profiles, EXIF with a preview), the whole image is read.
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class KindsOf:
    """Finds the kind of each sample of a shard, for a worker process."""

    shards: ShardSet

    def __call__(self, number: int, tick: Tick) -> list[str]:
        """Return the kinds (JpegHeader.kind, `not JPEG` or `damaged`) in the order of the samples."""
        file, kinds = self.shards.open_shard(number), list[str]()
        for record in self.shards.index(number):
            size, offset = int(record["size"]), int(record["offset"])
            head = np.empty(min(size, _HEAD_BYTES), dtype=np.uint8)
            kind = _kind_of(head[: file.read_into(head, offset)].tobytes())
            if kind == "damaged" and size > len(head):
                whole = np.empty(size, dtype=np.uint8)
                kind = _kind_of(whole[: file.read_into(whole, offset)].tobytes())
            kinds.append(kind)
            tick(1, len(head))
        return kinds


def _kind_of(data: bytes) -> str:
    if not is_jpeg(data):
        return "not JPEG"
    try:
        return parse_jpeg(data).kind
    except JpegError:
        return "damaged"


def note_kinds(where: str, *, workers: int, progress: ProgressBars | None = None) -> Manifest:
    """Count the kinds of a set that lacks them, and write its manifest again with them. Shards are only read.

    Args:
        where: folder with manifest.json, local or in a bucket.
        workers: processes.
        progress: draws a bar.

    Raises:
        ValueError: there is no finished set.
        OSError: a shard cannot be read.
    """
    shards = open_set(where)
    with (progress or ProgressBars(enabled=False)).stage(
        "looking at headers", unit=" images", total=shards.num_samples
    ) as tick:
        found = dict(run_tasks(KindsOf(shards), range(shards.num_shards), workers=workers, tick=tick))
    entries = ShardTable.of(
        replace(entry, jpegs=dict(sorted(Counter(found[number]).items())))
        for number, entry in enumerate(shards.manifest.shards)
    )
    total = sum((Counter(entry.jpegs) for entry in entries), Counter[str]())
    manifest = replace(shards.manifest, shards=entries, jpegs=dict(sorted(total.items())))
    ShardFolder(where=where, work_folder=WORK_FOLDER).put_manifest(manifest)
    return manifest
