"""Listing of the sources, of which the plan is made."""

import os
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.config import PackConfig
from shards.ground.errors import Rejected
from shards.ground.progress import ProgressBars
from shards.packing.as_is import packed_image
from shards.packing.aside import LeftAside
from shards.packing.depth import choose_depth
from shards.packing.inputs import read_inputs
from shards.packing.labels import InputLabels
from shards.packing.plan import LABEL_SETS_NAME, ROW, Header, PackPlan, Split, TableWriter
from shards.packing.shuffle import rows_at
from shards.sources import Aside, Found, Input, Source, open_source
from shards.sources.benchmarks import BenchmarkSource, refuse_shared
from shards.storage.file_kinds import stem_of_archive

__all__ = ["list_inputs"]

_PROBED = 64
_MOST_SAMPLES = 10_000
_CHUNK_ROWS = 1 << 18


def list_inputs(config: PackConfig, folder: Path, progress: ProgressBars) -> None:
    """List the sources and write the listing: a plan in which nothing is shuffled or left out.

    Args:
        config: of the packing.
        folder: for the files; empty.
        progress: shows how far it is, and takes what was found.

    Raises:
        ValueError: a source is not there, or is empty.
        PackError: a source cannot be listed.
    """
    sources = [open_source(path, config.source_options()) for path in config.sources]
    refuse_shared(source for source in sources if isinstance(source, BenchmarkSource))
    class_names, num_rows = _write_tables(config, sources, folder, progress)
    whole = Split(name="", first=0, num_positions=num_rows, shard_samples=num_rows)
    header = Header(
        settings=config.settings(),
        sources=[source.spec() for source in sources],
        class_names=class_names,
        splits=[whole],
        depth_range=config.depth_range,
        has_label_sets=(folder / LABEL_SETS_NAME).exists(),
    )
    # What follows reads inputs, and for that it needs a plan.
    header.write(folder)
    plan = PackPlan.open(str(folder))
    header = replace(header, depth_range=choose_depth(config, plan, progress))
    shard_samples = config.shard_samples or _samples_for(replace(config, depth_range=header.depth_range), plan)
    replace(header, splits=[replace(whole, shard_samples=shard_samples)]).write(folder)


def _write_tables(
    config: PackConfig, sources: list[Source], folder: Path, progress: ProgressBars
) -> tuple[tuple[str, ...], int]:
    """Write rows.bin, names.bin and left-aside.jsonl; returns the class names and the number of rows."""
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
    return _finish_labels(labels, folder, progress), table.num_rows


def _finish_labels(labels: InputLabels, folder: Path, progress: ProgressBars) -> tuple[str, ...]:
    """Replace provisional labels by final ones; returns the class names."""
    class_names, final = labels.resolve()
    for line in labels.say(class_names):
        progress.say(line)
    if labels.table.has_sets:
        np.save(folder / LABEL_SETS_NAME, labels.table.label_sets())
    if len(final):
        with (folder / "rows.bin").open("r+b") as file:
            while len(rows := np.fromfile(file, dtype=ROW, count=_CHUNK_ROWS)):
                rows["label"] = np.where(rows["label"] < 0, -1, final[rows["label"]])
                file.seek(-rows.nbytes, os.SEEK_CUR)
                rows.tofile(file)
    return class_names


def _samples_for(config: PackConfig, listed: PackPlan) -> int:
    """Return the inputs per shard that give about `shard_bytes`: a few inputs, evenly spread, are packed for it."""
    num_inputs, encoding = listed.num_positions, config.encoding()
    probed = np.unique(np.linspace(0, num_inputs - 1, min(_PROBED, num_inputs)).astype(np.int64))
    rows = rows_at(probed, num_inputs, config.seed) if config.shuffle else probed
    total = 0
    with closing(read_inputs(listed, listed.rows_at(rows))) as inputs:
        for item in inputs:
            # What cannot be packed takes no room.
            with suppress(Rejected):
                if isinstance(item.data, bytes):
                    total += len(packed_image(item.data, encoding).data) + 1536
    mean = max(1, total // len(probed))
    return int(min(_MOST_SAMPLES, max(1, config.shard_bytes // mean), num_inputs))
