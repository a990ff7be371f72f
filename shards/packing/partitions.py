"""Sorting on disk: records go to partitions by a number, and each partition is small enough to be sorted in memory."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.ground.files import remove

__all__ = ["Partitions", "chosen", "cut", "spans"]


class Partitions:
    """Files of records of one type, and of a text for each record, by the number of their partition.

    A file is opened for each write: there may be more partitions than a process may open files.

    Args:
        folder: for the files; it is made.
        dtype: of a record.
        has_texts: whether each record has a text.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], *, has_texts: bool = False) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = dtype
        self._has_texts = has_texts

    def add(self, numbers: NDArray[np.int64], records: NDArray[np.void], texts: Sequence[bytes] = ()) -> None:
        """Append records to their partitions; those of one partition stay in order.

        Args:
            numbers: (N,) of the partitions.
            records: (N,).
            texts: N, or none.
        """
        order = np.argsort(numbers, kind="stable")
        records, numbers = records[order], numbers[order]
        starts: list[int] = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(order)]):
            path = self._path(int(numbers[start]))
            _append(path, records[start:stop].tobytes())
            if self._has_texts:
                _append(path.with_suffix(".texts"), b"".join(chosen(texts, order[start:stop])))

    def take(self, number: int) -> tuple[NDArray[np.void], bytes]:
        """Return the records of a partition and their texts, one after the other; the partition is empty then."""
        path = self._path(number)
        if not path.exists():
            return np.empty(0, dtype=self._dtype), b""
        records = np.fromfile(path, dtype=self._dtype)
        texts = path.with_suffix(".texts").read_bytes() if self._has_texts else b""
        for each in (path, path.with_suffix(".texts")):
            remove(each)
        return records, texts

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.records"


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def cut(texts: bytes, sizes: NDArray[np.integer[Any]]) -> list[bytes]:
    """Return texts that lie one after the other.

    Args:
        texts: all of them.
        sizes: (N,) bytes of each.
    """
    ends: list[int] = np.cumsum(sizes, dtype=np.int64).tolist()
    return [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def chosen(texts: Sequence[bytes], order: NDArray[np.int64]) -> list[bytes]:
    """Return some texts, in an order.

    Args:
        texts: all of them.
        order: (N,) which of them.
    """
    numbers: list[int] = order.tolist()
    return [texts[number] for number in numbers]


def spans(num_rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Return (start, stop) of pieces of a range, in order."""
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
