"""Index of written embeddings: their vectors, chunk by chunk from disk, and what is known of a row."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_fast.embedding.formats import COLUMNS, HEADER_KEY, HEADER_NAME, header_beside, names_beside, needs_pyarrow
from shards.ground.arrays import Indices

__all__ = ["Index", "Row", "find_header", "open_index"]

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a row of an index."""

    row: int
    """Place in the index."""
    index: int
    """Dense sample number in the set that it was made from."""
    key: str
    source: str | None
    label: int | None
    class_name: str | None

    @property
    def name(self) -> str:
        """Return where it comes from, or its number."""
        return self.source or f"sample {self.index}"


class Index(ABC):
    """Written embeddings.

    Args:
        path: file or folder.
        header: what they say about themselves.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header

    @property
    def num_rows(self) -> int:
        """Return the number of vectors."""
        return self.header["num_rows"]

    @property
    def settings(self) -> dict[str, Any]:
        """Return what decided the vectors."""
        return self.header["settings"]

    @abstractmethod
    def chunks(self, begin: int = 0) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Give all vectors from row `begin` on, some at a time: the first one's row, and (n, D) float32 or float16."""

    @abstractmethod
    def vectors(self, numbers: Indices) -> npt.NDArray[Any]:
        """Return the vectors of (n,) rows, in rising order: (n, D) float32 or float16."""

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Return what is known of rows, in the order in which they are asked for."""

    @abstractmethod
    def all_rows(self) -> Iterator[Row]:
        """Give what is known of every row, in order, without holding all of it."""


def find_header(path: Path) -> dict[str, Any] | None:
    """Return what written embeddings say about themselves; None where nothing of that kind is there."""
    try:
        if path.is_dir():
            return json.loads((path / HEADER_NAME).read_text())
        if path.suffix == ".parquet" and path.is_file():
            needs_pyarrow(str(path))
            import pyarrow.parquet as pq

            return json.loads((pq.read_metadata(path).metadata or {})[HEADER_KEY])
        return json.loads(header_beside(path).read_text()) if path.is_file() else None
    except (OSError, KeyError, ValueError) as error:
        if "pyarrow:" in str(error):
            raise
        return None


def open_index(path: str | Path) -> Index:
    """Open what `moco-fast embed` wrote. Raises ValueError: it is something else, or unfinished."""
    path = Path(path)
    header = find_header(path)
    if header is None or header.get("format") != "moco-fast-embeddings":
        what = "is not something that `moco-fast embed` wrote" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: give the file or folder that was its --out")
    if path.is_dir() or path.suffix == ".parquet":
        needs_pyarrow(str(path))
        return _ParquetIndex(path, header)
    return _ArrayIndex(path, header)


class _ParquetIndex(Index):
    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        super().__init__(path, header)
        self._files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
        counts = [pq.read_metadata(file).num_rows for file in self._files]
        self._ends = list(accumulate(counts))
        if sum(counts) != self.num_rows:
            raise ValueError(
                f"{path} has {sum(counts):,} rows, not {self.num_rows:,}: files are missing, write it again"
            )
        self._groups_of = lru_cache(maxsize=16)(self._read_groups)

    def chunks(self, begin: int = 0) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        for first, count, read in self._vector_groups():
            if first + count > begin:
                skipped = max(0, begin - first)
                yield first + skipped, read()[skipped:]

    def vectors(self, numbers: Indices) -> npt.NDArray[Any]:
        found = [np.empty((0, self.header["dim"]), self.settings["dtype"])]
        for first, count, read in self._vector_groups():
            begin, end = np.searchsorted(numbers, [first, first + count])
            if begin < end:
                found.append(read()[numbers[begin:end] - first])
        return np.concatenate(found)

    def _vector_groups(self) -> Iterator[tuple[int, int, Callable[[], npt.NDArray[Any]]]]:
        """Give each row group's first row, its number of rows, and what reads its vectors until the next is given."""
        import pyarrow.parquet as pq

        def read(file: Any, group: int) -> npt.NDArray[Any]:
            column = file.read_row_group(group, columns=["vector"])["vector"].combine_chunks()
            return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.header["dim"])

        first = 0
        for path in self._files:
            with pq.ParquetFile(path, memory_map=True) as file:
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    yield first, count, partial(read, file, group)
                    first += count

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        return [self._row(number) for number in numbers]

    def _row(self, number: int) -> Row:
        file = int(np.searchsorted(self._ends, number, side="right"))
        first = 0 if file == 0 else self._ends[file - 1]
        begins, read = self._groups_of(file)
        group = int(np.searchsorted(begins, number - first, side="right")) - 1
        place = number - first - begins[group]
        return Row(row=number, **{name: column[place].as_py() for name, column in read(group).items()})

    def all_rows(self) -> Iterator[Row]:
        import pyarrow.parquet as pq

        number = 0
        for path in self._files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=list(COLUMNS)):
                    for values in batch.to_pylist():
                        yield Row(row=number, **values)
                        number += 1

    def _read_groups(self, file: int) -> tuple[list[int], Any]:
        """Return the first row of each row group of a file, and what reads the columns of one."""
        import pyarrow.parquet as pq

        opened = pq.ParquetFile(self._files[file])
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]

        @lru_cache(maxsize=16)
        def read(group: int) -> dict[str, Any]:
            table = opened.read_row_group(group, columns=list(COLUMNS))
            return {name: table[name] for name in COLUMNS}

        return [0, *accumulate(sizes[:-1])], read


class _ArrayIndex(Index):
    def chunks(self, begin: int = 0) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        values = self._values()
        step = max(1, _CHUNK_BYTES // max(1, values.itemsize * values.shape[1]))
        for row in range(begin, len(values), step):
            yield row, values[row : row + step]

    def vectors(self, numbers: Indices) -> npt.NDArray[Any]:
        return self._values()[numbers]

    def _values(self) -> npt.NDArray[Any]:
        shape = (self.num_rows, self.header["dim"])
        dtype = np.dtype(self.settings["dtype"]).newbyteorder("<")
        with self.path.open("rb") as file:
            if self.path.suffix == ".npy":
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
            else:
                # The vectors are the first of the tensors.
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            begin, size = file.tell(), file.seek(0, 2)
        if size < begin + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise ValueError(f"{self.path} is cut off: copy it again, or write it again")
        return np.memmap(self.path, dtype, "r", begin, shape) if shape[0] else np.empty(shape, dtype)

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        wanted, found = set(numbers), dict[int, Row]()
        for number, values in self._lines():
            if number in wanted:
                found[number] = _row_of(number, values)
            if len(found) == len(wanted):
                break
        return [found[number] for number in numbers]

    def all_rows(self) -> Iterator[Row]:
        return (_row_of(number, values) for number, values in self._lines())

    def _lines(self) -> Iterator[tuple[int, dict[str, str]]]:
        with names_beside(self.path).open(newline="") as file:
            yield from enumerate(csv.DictReader(file))


def _row_of(number: int, values: dict[str, str]) -> Row:
    return Row(
        row=number,
        index=int(values["index"]),
        key=values["key"],
        source=values["source"] or None,
        label=int(values["label"]) if values["label"] else None,
        class_name=values["class_name"] or None,
    )
