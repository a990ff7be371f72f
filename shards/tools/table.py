"""Command `table`: what a set of shards holds as one Parquet file, a row for each sample, for analysis."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shards.ground.files import appearing
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars
from shards.packing.write import KEY_DIGITS
from shards.sets.base import ShardSet
from shards.sets.record import INDEXED
from shards.sets.registry import open_set
from shards.sources.samples import split_name
from shards.storage.file_kinds import TABLE_NAME
from shards.storage.stores import is_url
from shards.tools.jpeg_kinds import KindsOf

__all__ = ["write_table"]


def write_table(
    where: str, out: str | None = None, *, workers: int, progress: ProgressBars | None = None
) -> tuple[Path, int]:
    """Write a set's index, sources and labels as a Parquet file, one row group for each shard.

        from shards.tools.table import write_table

        path, num_samples = write_table("packed", workers=2)

    Columns: sample (dense sample number), shard, key, source, width, height, bytes, offset (in the shard), format
    (kind of JPEG), crc32c, label, class; in place of the last two, labels where samples have sets of classes. Images
    are only read, up to their headers, in shards with several kinds of JPEG.

    Args:
        where: the set: folder or address.
        out: the file; None: samples.parquet in the set's folder.
        workers: processes that read headers.
        progress: shows how far that is.

    Returns:
        the file, and its number of rows.

    Raises:
        ValueError: no such set, pyarrow is missing, or the set has no files beside its samples.
    """
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            "`make-shards table` needs pyarrow: install it with `pip install 'moco-fast[parquet]'`"
        ) from None
    if out is None and (is_url(where) or not Path(where).is_dir()):
        raise ValueError(f"{where} is not a folder on this machine: say where the table goes with --file")
    shards = open_set(where)
    path = Path(where) / TABLE_NAME if out is None else Path(out)
    kinds = _kinds(shards, workers, progress or ProgressBars(enabled=False))
    schema = _schema(arrow, has_sets=shards.manifest.has_label_sets)
    first = 0
    with appearing(path, durable=True) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
        for shard in range(shards.num_shards):
            columns = _columns(shards, shard, kinds.get(shard), first)
            if num := len(columns["sample"]):
                writer.write_table(arrow.table(columns, schema=schema))
            first += num
    return path, first


def _schema(arrow: Any, *, has_sets: bool) -> Any:
    name = arrow.dictionary(arrow.int32(), arrow.string())
    labels = [("labels", arrow.list_(arrow.string()))]
    fields = [
        ("sample", arrow.int64()),
        ("shard", name),
        ("key", arrow.string()),
        ("source", arrow.string()),
        ("width", arrow.int32()),
        ("height", arrow.int32()),
        ("bytes", arrow.int64()),
        ("offset", arrow.int64()),
        ("format", name),
        ("crc32c", arrow.uint32()),
        *(labels if has_sets else [("label", arrow.int32()), ("class", name)]),
    ]
    return arrow.schema(fields)


def _kinds(shards: ShardSet, workers: int, progress: ProgressBars) -> dict[int, list[str]]:
    """Return the kinds of the samples of those shards that have several, or of which they are not known."""
    mixed = [n for n, entry in enumerate(shards.manifest.shards) if len(entry.jpegs) != 1 and entry.num_samples]
    total = sum(shards.manifest.shards[number].num_samples for number in mixed)
    if not total:
        return {}
    with progress.stage("looking at headers", unit=" images", total=total) as tick:
        return dict(run_tasks(KindsOf(shards), mixed, workers=workers, tick=tick))


def _columns(shards: ShardSet, shard: int, kinds: list[str] | None, first: int) -> dict[str, Any]:
    """Return the rows of a shard, column by column."""
    entry, records = shards.manifest.shards[shard], shards.index(shard)
    part, _ = shards.part(shard)
    sources = part.read_beside(f"{entry.stem}.sources.txt").decode().splitlines()
    if len(sources) != len(records):
        raise ValueError(
            f"{shards.shard_name(shard)}: {entry.stem}.sources.txt has {len(sources)} lines for {len(records)} "
            "samples: `make-shards verify` says more"
        )
    columns: dict[str, Any] = {
        "sample": np.arange(first, first + len(records)),
        "shard": [entry.name] * len(records),
        "key": _keys(part, records["position"].tolist(), sources),
        "source": sources,
        "bytes": records["size"].astype(np.int64),
        "offset": records["offset"].astype(np.int64),
        "format": kinds or list(entry.jpegs) * len(records),
        "crc32c": np.asarray(records["crc32c"]),
    }
    columns |= {name: records[name].astype(np.int32) for name in ("width", "height")}
    names = shards.class_names
    if shards.manifest.has_label_sets:
        rows = shards.label_sets(shard)
        return columns | {"labels": [[names[label] for label in np.flatnonzero(row == 1)] for row in rows]}
    numbers: list[int] = records["label"].tolist()
    labels = [number if number >= 0 else None for number in numbers]
    classes = [names[number] if number >= 0 else None for number in numbers]
    return columns | {"label": labels, "class": classes}


def _keys(part: ShardSet, positions: list[int], sources: list[str]) -> list[str]:
    if not part.manifest.settings.get(INDEXED):
        return [f"{position:0{KEY_DIGITS}d}" for position in positions]
    split = (split_name(source.encode()) for source in sources)
    return [(name.folder + name.key).decode() for name in split]
