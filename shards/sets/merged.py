"""Several sets of shards as one."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from shards.ground.arrays import Indices, LabelSets, Records
from shards.sets.base import BaseSet, RemoteSet, SetKind, ShardCopy, ShardSet, grouped
from shards.sets.manifest import Manifest, ShardTable
from shards.sets.record import RECORD
from shards.sets.shard_file import ShardFile

__all__ = ["MergedShardSet"]


class MergedShardSet(BaseSet):
    """The shards of several sets, set after set.

    Labels are kept if all sets have the same class names, and one label per sample or sets of them; otherwise there are
    none, since the numbers of one set have another meaning in the next.

    Args:
        parts: the sets, in the order of the dense sample numbers.
        manifest: of all of them, if it is made already.
    """

    kind: ClassVar[SetKind] = "merged"

    def __init__(self, parts: Sequence[ShardSet], manifest: Manifest | None = None) -> None:
        manifest = manifest or _merge([part.manifest for part in parts])
        super().__init__(",".join(part.where for part in parts), manifest)
        self.parts = tuple(parts)
        counts = np.array([part.num_shards for part in parts], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts: list[int] = (self._ends - counts).tolist()

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (MergedShardSet, (self.parts, self.manifest))

    @property
    def has_dropped_labels(self) -> bool:
        """Whether labels were dropped because the sets number their classes differently."""
        return not self.class_names and any(part.class_names for part in self.parts)

    def part(self, shard: int) -> tuple[ShardSet, int]:
        """Return the set that a shard is from, and its number there."""
        number = int(np.searchsorted(self._ends, shard, side="right"))
        return self.parts[number], shard - self._starts[number]

    def with_copies(self, copy: Callable[[RemoteSet], ShardSet]) -> ShardSet:
        """Return the same set with what `copy` gives in place of each part that is not on this machine."""
        return MergedShardSet([part.with_copies(copy) for part in self.parts], self.manifest)

    def copy_of(self, shard: int) -> ShardCopy | None:
        """Return the local copy that a shard is read from, if it is."""
        part, inner = self.part(shard)
        return part.copy_of(inner)

    @property
    def copied_bytes(self) -> Indices:
        """(num_shards,) disk that the local copy of each shard takes; 0 where it is read where it is."""
        return np.concatenate([part.copied_bytes for part in self.parts])

    def shard_name(self, shard: int) -> str:
        """Return where a shard is, for messages."""
        part, inner = self.part(shard)
        return part.shard_name(inner)

    def label_sets(self, shard: int) -> LabelSets:
        """Return the classes of a shard's samples where labels are sets; see ShardSet."""
        part, inner = self.part(shard)
        return part.label_sets(inner)

    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard's tar. Raises FileNotFoundError."""
        part, inner = self.part(shard)
        return part.open_shard(inner)

    @property
    def reads_ranges(self) -> bool:
        """Whether the shards of some part stay where they are, over a network."""
        return any(part.reads_ranges for part in self.parts)

    def records_of(self, samples: Indices) -> Records:
        """Return the records of samples by their dense numbers, (n,) of RECORD. Raises ValueError."""
        found = np.empty(len(samples), dtype=RECORD)
        ends = np.cumsum([part.num_samples for part in self.parts])
        for number, places in grouped(np.searchsorted(ends, samples, side="right")):
            part = self.parts[number]
            found[places] = part.records_of(samples[places] - (ends[number] - part.num_samples))
        if self.has_dropped_labels:
            found["label"] = -1
        return found

    def index(self, shard: int) -> Records:
        """Return the records of a shard, (shard_sizes[shard],) of RECORD. Raises ValueError."""
        part, inner = self.part(shard)
        records = part.index(inner)
        if self.has_dropped_labels:
            records = np.array(records)
            records["label"] = -1
        return records


def _merge(manifests: list[Manifest]) -> Manifest:
    names, has_sets = manifests[0].class_names, manifests[0].has_label_sets
    agree = all(each.class_names == names and each.has_label_sets == has_sets for each in manifests)
    outcomes: Counter[str] = Counter()
    jpegs: Counter[str] = Counter()
    for manifest in manifests:
        outcomes.update(manifest.outcomes)
        jpegs.update(manifest.jpegs)
    return replace(
        manifests[0],
        shards=ShardTable.joined(manifest.shards for manifest in manifests),
        class_names=names if agree else (),
        has_label_sets=has_sets and agree,
        num_inputs=sum(manifest.num_inputs for manifest in manifests),
        num_samples=sum(manifest.num_samples for manifest in manifests),
        num_rejected=sum(manifest.num_rejected for manifest in manifests),
        left_aside=dict(sum((Counter(manifest.left_aside) for manifest in manifests), Counter[str]())),
        max_width=max(manifest.max_width for manifest in manifests),
        max_height=max(manifest.max_height for manifest in manifests),
        max_bytes=max(manifest.max_bytes for manifest in manifests),
        outcomes=dict(outcomes),
        rejections={},
        jpegs=dict(jpegs),
        settings={},
    )
