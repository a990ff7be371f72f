"""Lists for other programs: what `moco-fast explore` found, as CSV, JSON lines or Parquet, whole or absent.

duplicates.csv    every image that has near-duplicates; groups are numbered by their first image
outliers.csv      the images least like their neighbors, the most isolated first
labels.csv        images most of whose neighbors share another label
keep.csv          path and label of every image but the near-duplicates to drop, for `make-shards pack`
"""

import csv
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moco_fast.embedding.explore import Explored
from moco_fast.embedding.formats import needs_pyarrow
from moco_fast.embedding.index import Index, Row
from shards.ground.files import appearing, remove

__all__ = ["KEEP_NAME", "ListFormat", "write_lists"]

ListFormat = Literal["csv", "jsonl", "parquet"]
KEEP_NAME = "keep.csv"

_BATCH = 10_000
_OF_ROW: dict[str, type] = {"key": str, "index": int, "source": str, "label": int, "class_name": str}
_DUPLICATES = {"key": str, "group": int, "representative": str, "similarity": float, **_OF_ROW}
_OUTLIERS = {"similarity": float, **_OF_ROW}
_LABELS = {"neighbors_label": int, "neighbors_class_name": str, "share": float, "similarity": float, **_OF_ROW}

Write = Callable[[Mapping[str, Any]], None]


def write_lists(folder: Path, index: Index, explored: Explored, *, suffix: ListFormat, num_outliers: int) -> str:
    """Write all lists; the rows are read once, and none of them is held.

    Args:
        folder: where they go.
        index: that was explored.
        explored: what was found.
        suffix: format, and ending of the names.
        num_outliers: length of that list.

    Returns:
        why there is no list of what to keep; empty if there is one.

    Raises:
        ValueError: Parquet is wanted without its package.
    """
    if suffix == "parquet":
        needs_pyarrow("--format parquet")
    for old in ("csv", "jsonl", "parquet"):
        for name in ("duplicates", "outliers", "labels"):
            remove(folder / f"{name}.{old}")
    remove(folder / KEEP_NAME)
    with _list_file(folder / f"outliers.{suffix}", _OUTLIERS) as write:
        for row in index.rows(explored.outliers[:num_outliers].tolist()):
            write({"similarity": _rounded(explored.likeness[row.row]), **_columns(row)})
    rows = index.all_rows()
    has_labels = bool((explored.labels >= 0).any())
    with ExitStack() as stack:
        duplicate = stack.enter_context(_list_file(folder / f"duplicates.{suffix}", _DUPLICATES))
        label = stack.enter_context(_list_file(folder / f"labels.{suffix}", _LABELS)) if has_labels else None
        rows = _noting_duplicates(rows, explored, duplicate)
        rows = rows if label is None else _noting_labels(rows, index, explored, label)
        return _write_keep(folder / KEEP_NAME, rows, explored, has_labels=has_labels)


def _noting_duplicates(rows: Iterable[Row], explored: Explored, write: Write) -> Iterable[Row]:
    near = explored.neighbors.duplicates
    number = {first: place for place, first in enumerate(np.sort(explored.groups).tolist(), 1)}
    keys: dict[int, str] = {}
    for row in rows:
        if explored.group_sizes[row.row] > 1:
            # What stays comes first.
            keys |= {row.row: row.key} if near.stays[row.row] == row.row else {}
            what = {
                "group": number[int(explored.group[row.row])],
                "representative": keys[int(near.stays[row.row])],
                "similarity": _rounded(near.similarity[row.row]),
            }
            write(what | _columns(row))
        yield row


def _noting_labels(rows: Iterable[Row], index: Index, explored: Explored, write: Write) -> Iterable[Row]:
    names = index.header["class_names"]
    suspicious = set(explored.suspicious.tolist())
    for row in rows:
        if row.row in suspicious:
            majority = int(explored.majority[row.row])
            write(
                {
                    "neighbors_label": majority,
                    "neighbors_class_name": names[majority] if majority < len(names) else None,
                    "share": _rounded(explored.share[row.row]),
                    "similarity": _rounded(explored.likeness[row.row]),
                    **_columns(row),
                }
            )
        yield row


def _write_keep(path: Path, rows: Iterable[Row], explored: Explored, *, has_labels: bool) -> str:
    """Write what stays, if every image is a file of its own; all rows are consumed in any case."""
    stays, missing = explored.neighbors.duplicates.stays, ""
    with _list_file(path, {"path": str, "label": str} if has_labels else {"path": str}) as write:
        for row in rows:
            if missing or row.row != stays[row.row]:
                continue
            if row.source is None or not Path(row.source).is_file():
                missing = row.name
                continue
            label = row.class_name if row.class_name is not None or row.label is None else str(row.label)
            entry = {"path": str(Path(row.source).absolute())}
            write(entry | {"label": label} if has_labels else entry)
    if missing:
        remove(path)
        return f"{missing} is not a file of its own (any more), and make-shards takes lists of files"
    return ""


def _rounded(similarity: float) -> float:
    return round(min(float(similarity), 1.0), 6)


def _columns(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _OF_ROW}


@contextmanager
def _list_file(path: Path, columns: Mapping[str, type]) -> Generator[Write]:
    """Give what writes an entry into a file of the format that its name ends with."""
    with appearing(path, durable=False) as aside:
        if path.suffix == ".parquet":
            with _parquet_list(aside, columns) as write:
                yield write
            return
        with aside.open("w", newline="") as file:
            if path.suffix == ".jsonl":
                yield lambda entry: print(json.dumps(entry, ensure_ascii=False), file=file)
                return
            table = csv.DictWriter(file, list(columns), lineterminator="\n")
            table.writeheader()
            yield table.writerow


@contextmanager
def _parquet_list(path: Path, columns: Mapping[str, type]) -> Generator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[of]) for name, of in columns.items()])
    held: list[Mapping[str, Any]] = []
    with pq.ParquetWriter(path, schema) as file:

        def flush() -> None:
            file.write_table(pa.Table.from_pylist(held, schema))
            held.clear()

        def write(entry: Mapping[str, Any]) -> None:
            held.append(entry)
            if len(held) == _BATCH:
                flush()

        yield write
        flush()
