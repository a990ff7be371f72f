"""Images as a set of shards: one that is there, or one that is packed on the fly; and what is known of each sample."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.config import PackConfig
from shards.ground.arrays import Indices
from shards.ground.errors import AmbiguousLabelsError
from shards.ground.progress import ProgressBars
from shards.packing.pack import pack
from shards.sets import ShardSet, open_set
from shards.sets.manifest import MANIFEST_NAME
from shards.sets.registry import may_be_set
from shards.storage.stores import open_folder
from shards.storage.target import WORK_NAME

__all__ = ["Origins", "are_shards", "pack_files", "pack_images", "rejected"]


def are_shards(images: str) -> bool:
    """Whether a path or an address names shards, and not images that have to be packed first."""
    return "," in images or may_be_set(images)


def pack_images(images: str, folder: Path, progress: ProgressBars | None = None) -> ShardSet:
    """Pack every image of what `make-shards pack` takes into a folder, in its order; continues what was begun there.

    Where it is not clear what the labels are, there are none.

    Raises:
        ValueError: there are no such images, or none that can be read.
    """
    config = PackConfig(
        sources=(images,),
        out=str(folder),
        shuffle=False,
        labels=_labels_of_begun(folder),
        members=("all",),
    )
    try:
        pack(config, progress)
    except AmbiguousLabelsError:
        pack(replace(config, labels="none"), progress)
    return _with_samples(folder, images)


def _labels_of_begun(folder: Path) -> str:
    for path in (folder / MANIFEST_NAME, folder / WORK_NAME / "plan" / "plan.json"):
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["settings"]["labels"]
    return "auto"


def pack_files(paths: Sequence[str], folder: Path) -> ShardSet:
    """Pack files into a new folder, in their order, without labels. Raises ValueError: none can be read."""
    names = folder.with_name(f"{folder.name}.jsonl")
    names.write_text("".join(json.dumps({"path": str(Path(path).absolute())}) + "\n" for path in paths))
    pack(PackConfig(sources=(str(names),), out=str(folder), shuffle=False, labels="none", workers=1))
    return _with_samples(folder, ", ".join(paths[:3]) + ("" if len(paths) < 4 else " and others"))


def _with_samples(folder: Path, images: str) -> ShardSet:
    packed = open_set(folder)
    if not packed.num_samples:
        reasons = "; ".join(rejected(folder)[:3])
        raise ValueError(f"{images} holds no image that can be read{f' ({reasons})' if reasons else ''}")
    return packed


def rejected(packed: Path) -> list[str]:
    """Return the images that a packing rejected, each with the reason."""
    lines = (packed / "rejected.jsonl").read_text().splitlines()
    return [f"{entry['source']}: {entry['reason']}" for entry in map(json.loads, lines)]


class Origins:
    """Keys and sources of a set's samples, by their dense numbers.

    Args:
        shards: the set.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._ends = np.cumsum(shards.shard_sizes)
        self._sources_of = lru_cache(maxsize=4)(self._read_sources)

    def keys(self, samples: range) -> Indices:
        """Return (len(samples),) int64 keys, planned positions in their set."""
        found = [self._shards.index(shard)["position"][part].astype(np.int64) for shard, part in self._within(samples)]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def sources(self, samples: range) -> list[str | None]:
        """Return where samples come from; None for those whose set does not say."""
        return [source for shard, part in self._within(samples) for source in self._sources_of(shard)[part]]

    def _within(self, samples: range) -> Iterator[tuple[int, slice]]:
        """Give the shards that hold samples, each with the places of those in it."""
        shard = int(np.searchsorted(self._ends, samples.start, side="right"))
        begin = samples.start
        while begin < samples.stop:
            end = int(self._ends[shard])
            first = end - int(self._shards.shard_sizes[shard])
            yield shard, slice(begin - first, min(samples.stop, end) - first)
            begin, shard = end, shard + 1

    def _read_sources(self, shard: int) -> Sequence[str | None]:
        part, number = self._shards.part(shard)
        entry = part.manifest.shards[number]
        name = f"{entry.stem}.sources.txt"
        text: bytes | None = None
        if part.kind == "local" and (Path(part.where) / name).is_file():
            text = (Path(part.where) / name).read_bytes()
        if part.kind == "remote":
            try:
                text = open_folder(part.where).read(name)
            except FileNotFoundError:
                text = None
        lines = [] if text is None else text.decode("utf-8", "replace").split("\n")[:-1]
        return lines if len(lines) == entry.num_samples else [None] * entry.num_samples
