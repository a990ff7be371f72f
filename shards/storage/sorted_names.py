"""Sort of names on disk: more of them than memory holds, each with a size."""

from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import chain, islice
from pathlib import Path

import numpy as np

__all__ = ["SortedNames"]

_RUN_NAMES = 1 << 19
_BLOCK_NAMES = 1 << 12
_SIZES = np.dtype([("length", "<u4"), ("size", "<i8")])
Named = tuple[bytes, int]


class SortedNames:
    """Names with sizes, sorted by name, which can be walked through any number of times.

    They are written in runs, each sorted in memory. Runs that follow upon each other, as those of a store that lists in
    order, are read one after the other; only others are merged.

    Args:
        pairs: (name, size), taken at once.
        folder: for the runs; it is made, and removed by `remove`.
    """

    def __init__(self, pairs: Iterable[Named], folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._runs: list[Path] = []
        self._is_sorted = True
        last = b""
        rest = iter(pairs)
        while run := list(islice(rest, _RUN_NAMES)):
            run.sort()
            self._is_sorted &= last <= run[0][0]
            last = run[-1][0]
            self._write(run)

    def _write(self, run: list[Named]) -> None:
        path = self._folder / f"{len(self._runs):06d}"
        sizes = np.empty(len(run), dtype=_SIZES)
        sizes["length"] = [len(name) for name, _ in run]
        sizes["size"] = [size for _, size in run]
        path.with_suffix(".names").write_bytes(b"".join([name for name, _ in run]))
        path.with_suffix(".sizes").write_bytes(sizes.tobytes())
        self._runs.append(path)

    def __iter__(self) -> Iterator[Named]:
        """Return (name, size) in the order of the names."""
        runs = [_read(path) for path in self._runs]
        return chain.from_iterable(runs) if self._is_sorted else merge(*runs)

    def remove(self) -> None:
        """Remove the runs."""
        for path in self._runs:
            path.with_suffix(".names").unlink()
            path.with_suffix(".sizes").unlink()
        self._folder.rmdir()


def _read(path: Path) -> Iterator[Named]:
    # Opened for each block: there may be more runs than a process may open files.
    names_at = 0
    num_names = path.with_suffix(".sizes").stat().st_size // _SIZES.itemsize
    for start in range(0, num_names, _BLOCK_NAMES):
        sizes = np.fromfile(
            path.with_suffix(".sizes"), dtype=_SIZES, count=_BLOCK_NAMES, offset=start * _SIZES.itemsize
        )
        ends: list[int] = np.cumsum(sizes["length"], dtype=np.int64).tolist()
        with path.with_suffix(".names").open("rb") as file:
            file.seek(names_at)
            names = file.read(ends[-1])
        names_at += ends[-1]
        numbers: list[int] = sizes["size"].tolist()
        for begin, end, number in zip([0, *ends], ends, numbers, strict=False):
            yield names[begin:end], number
