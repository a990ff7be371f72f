"""Listing of the sources, from which the plan is made."""

from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.config import PackConfig
from shards.ground.cpus import available_cpus
from shards.ground.errors import Rejected
from shards.ground.files import appearing, remove
from shards.ground.progress import ProgressBars
from shards.packing.as_is import packed_image
from shards.packing.aside import LeftAside
from shards.packing.content import digest_contents, first_of_each, split_of
from shards.packing.depth import choose_depth
from shards.packing.inputs import read_inputs
from shards.packing.labels import InputLabels
from shards.packing.plan import (
    LABEL_SETS_NAME,
    ROW,
    Duplicates,
    Header,
    PackPlan,
    ShardTask,
    Split,
    TableWriter,
    shuffled,
)
from shards.sources import Aside, Found, Input, Source, open_source
from shards.sources.benchmarks import BenchmarkSource, refuse_shared
from shards.storage.file_kinds import stem_of_archive

__all__ = ["make_plan"]

_PROBED = 64
_MOST_SAMPLES = 10_000


def make_plan(config: PackConfig, folder: Path, progress: ProgressBars) -> PackPlan:
    """List the sources and write the plan to `folder`, which appears whole or not at all.

    Raises:
        ValueError: a source is not there, or is empty.
        PackError: a source cannot be listed.
    """
    sources = [open_source(path, config.source_options()) for path in config.sources]
    refuse_shared(source for source in sources if isinstance(source, BenchmarkSource))
    with appearing(folder, durable=True) as building:
        building.mkdir(parents=True)
        _build_plan(config, sources, building, progress)
        # One that was killed before others knew of it left a plan that no one follows.
        remove(folder)
    return PackPlan.open(folder)


def _build_plan(config: PackConfig, sources: list[Source], folder: Path, progress: ProgressBars) -> None:
    class_names = _list_inputs(config, sources, folder, progress)
    num_rows = (folder / "rows.bin").stat().st_size // ROW.itemsize
    order = shuffled(num_rows, config.seed) if config.shuffle else np.arange(num_rows, dtype=np.uint64)
    order.astype("<u8").tofile(folder / "order.bin")
    whole = Split(name="", first=0, num_positions=num_rows, shard_samples=num_rows)
    header = Header(settings=config.settings(), sources=sources, class_names=class_names, splits=[whole])
    # What follows reads inputs, and for that it needs a plan, if only of one shard.
    Duplicates.none().write(folder)
    header.write(folder)
    plan = PackPlan.open(folder)
    header = replace(header, depth_range=choose_depth(config, plan, progress))
    decided = replace(config, depth_range=header.depth_range)
    shard_samples = config.shard_samples or _samples_for(decided, plan)
    by_content = bool(config.splits) or config.dedup
    splits = _cut_by_content(config, folder, order, progress) if by_content else [whole]
    replace(header, splits=[replace(split, shard_samples=shard_samples) for split in splits]).write(folder)


def _list_inputs(config: PackConfig, sources: list[Source], folder: Path, progress: ProgressBars) -> tuple[str, ...]:
    """Write rows.bin, names.bin and left-aside.jsonl; returns the class names."""
    labels, aside = InputLabels("none" if config.annotations else config.labels, config.sources), LeftAside()
    # Of each source, the number of the one that the user named.
    named = list(range(len(sources)))
    with TableWriter(folder) as table, progress.stage("listing", unit=" inputs") as tick:
        # The list grows while it is walked: by the archives that folders hold.
        for number, source in enumerate(sources):
            archive = stem_of_archive(source.path)
            for item in source.inputs(folder / f"spool-{number}"):
                if isinstance(item, Input):
                    label = labels.number(named[number], item, archive)
                    table.add(number, label, item.name, item.offset, item.size)
                    tick(1)
                elif isinstance(item, Aside):
                    aside.add(source, item)
                elif isinstance(item, Found):
                    progress.say(item.what)
                    if config.labels in ("auto", "column"):
                        labels.table.declare(item.class_names)
                else:
                    sources.append(item)
                    named.append(named[number])
    aside.write(folder)
    if not table.num_rows:
        left = f" ({aside.describe()})" if aside.counts else ""
        raise ValueError(f"no files in {', '.join(config.sources)}{left}: is this the right folder?")
    class_names, final = labels.resolve()
    for line in labels.say(class_names):
        progress.say(line)
    if labels.table.has_sets:
        np.save(folder / LABEL_SETS_NAME, labels.table.label_sets())
    if len(final):
        rows = np.memmap(folder / "rows.bin", dtype=ROW, mode="r+")
        provisional = rows["label"]
        rows["label"] = np.where(provisional < 0, -1, final[provisional])
        rows.flush()
    return class_names


def _samples_for(config: PackConfig, plan: PackPlan) -> int:
    """Return the inputs per shard that give about `shard_bytes`: a few inputs, evenly spread, are packed for it."""
    num_inputs, encoding = plan.num_inputs, config.encoding()
    probed = np.unique(np.linspace(0, num_inputs - 1, min(_PROBED, num_inputs)).astype(np.int64))
    total = 0
    with closing(read_inputs(plan, plan.rows(ShardTask(split=0, shard=0))[probed])) as inputs:
        for item in inputs:
            # What cannot be packed takes no room.
            with suppress(Rejected):
                if isinstance(item.data, bytes):
                    total += len(packed_image(item.data, encoding).data) + 1536
    mean = max(1, total // len(probed))
    return int(min(_MOST_SAMPLES, max(1, config.shard_bytes // mean), num_inputs))


def _cut_by_content(config: PackConfig, folder: Path, order: NDArray[np.uint64], progress: ProgressBars) -> list[Split]:
    """Rewrite order.bin split after split, without duplicates if these are to go."""
    digests = digest_contents(folder, len(order), workers=config.workers or available_cpus(), progress=progress)
    names = ["train", *(name for name, _ in config.splits)] if config.splits else [""]
    split = split_of(digests, [share for _, share in config.splits])
    rows = np.arange(len(order))
    firsts = first_of_each(digests) if config.dedup else rows
    Duplicates.of(firsts, split).write(folder)
    kept = order[firsts[order] == order]
    parts = [kept[split[kept] == number] for number in range(len(names))]
    np.concatenate(parts).astype("<u8").tofile(folder / "order.bin")
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return [
        Split(name=name, first=int(start), num_positions=len(part), shard_samples=1)
        for name, start, part in zip(names, starts, parts, strict=False)
    ]
