"""Arrangement of a listing: its rows in planned order, split after split, without duplicates if these are to go.

Everything is sorted on disk, in partitions that fit in memory: a billion rows take 1 byte of memory each, and 160 bytes
of local disk beside the listing.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.packing.content import first_of_each, split_of
from shards.packing.partitions import Partitions, chosen, cut, spans
from shards.packing.plan import ROW, PackPlan, Split, TableWriter, duplicates_name
from shards.packing.shuffle import shuffle_keys

__all__ = ["Digests", "arrange"]

ReadDigests = Callable[[int, int], NDArray[np.void]]
"""Gives the digests of the rows from one number to another, (N,) of content.DIGEST."""

_CHUNK_ROWS = 1 << 19
_PARTITION_ROWS = 1 << 20
_KEYED_ROW = np.dtype([("key", "<u8"), ("row", ROW)])
_NUMBERED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])
_DUPLICATE = np.dtype([("row", "<u8"), ("first", "<u8")])
_DESCRIBED = np.dtype([("row", "<u8"), ("size", "<u4")])


@dataclass(frozen=True)
class Digests:
    """The contents of a listing's inputs, and what is decided by them."""

    read: ReadDigests
    splits: tuple[tuple[str, float], ...]
    """(name, share) of each held-out set."""
    dedup: bool

    @property
    def names(self) -> list[str]:
        """Names of the splits."""
        return ["train", *(name for name, _ in self.splits)] if self.splits else [""]


def arrange(
    listed: PackPlan, folder: Path, *, seed: int | None, shard_samples: int, digests: Digests | None
) -> list[Split]:
    """Write the tables of a plan.

    Args:
        listed: the listing.
        folder: for the tables; what is sorted lies there as well meanwhile.
        seed: of the shuffle; None: inputs stay in their order.
        shard_samples: planned positions per shard.
        digests: None: nothing is decided by content.

    Returns:
        The splits.
    """
    num_rows = listed.num_positions
    duplicates = _Duplicates(listed, folder, digests) if digests is not None and digests.dedup else None
    names = digests.names if digests is not None else [""]
    num_partitions = -(-num_rows // _PARTITION_ROWS)
    sorting = Partitions(folder / "sorting", _KEYED_ROW, has_texts=True)
    counts = np.zeros(len(names), dtype=np.int64)
    for start, stop in spans(num_rows, _CHUNK_ROWS):
        table, together = listed.rows(start, stop)
        texts = cut(together, table["name_size"])
        split = np.zeros(len(table), dtype=np.int64)
        if digests is not None:
            split = split_of(digests.read(start, stop), [share for _, share in digests.splits])
        keyed = np.empty(len(table), dtype=_KEYED_ROW)
        numbers = np.arange(start, stop, dtype=np.uint64)
        keyed["key"] = numbers if seed is None else shuffle_keys(numbers, seed)
        keyed["row"] = table
        partition = split * num_partitions + _partition_of(keyed["key"], num_partitions, is_shuffled=seed is not None)
        if duplicates is not None:
            kept = duplicates.take_out(start, table, texts, split)
            keyed, partition, split = keyed[kept], partition[kept], split[kept]
            texts = chosen(texts, kept)
        counts += np.bincount(split, minlength=len(names))
        sorting.add(partition, keyed, texts)
    _write_sorted(sorting, len(names) * num_partitions, folder)
    (folder / "sorting").rmdir()
    num_duplicates = duplicates.close() if duplicates is not None else Counter[int]()
    starts: list[int] = (np.cumsum(counts) - counts).tolist()
    return [
        Split(
            name=name,
            first=first,
            num_positions=int(count),
            shard_samples=shard_samples,
            num_duplicates=num_duplicates[number],
        )
        for number, (name, first, count) in enumerate(zip(names, starts, counts, strict=True))
    ]


def _partition_of(keys: NDArray[np.uint64], num_partitions: int, *, is_shuffled: bool) -> NDArray[np.int64]:
    """Return the partition of each key; the keys of one partition are all below those of the next one."""
    if not is_shuffled:
        return (keys // np.uint64(_PARTITION_ROWS)).astype(np.int64)
    # Upper 32 bits: products of them fit 64 bits.
    return ((keys >> np.uint64(32)) * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


def _write_sorted(sorting: Partitions, num_partitions: int, folder: Path) -> None:
    with TableWriter(folder) as table:
        for number in range(num_partitions):
            keyed, texts = sorting.take(number)
            order = np.argsort(keyed["key"])
            table.extend(keyed["row"][order], b"".join(chosen(cut(texts, keyed["row"]["name_size"]), order)))


class _Duplicates:
    """The inputs that have the same content as an earlier one.

    Args:
        listed: the listing.
        folder: for the lists of them, and what is sorted meanwhile.
        digests: of the listing.
    """

    def __init__(self, listed: PackPlan, folder: Path, digests: Digests) -> None:
        self._listed = listed
        self._folder = folder
        self._counts = Counter[int]()
        self._is_dropped = np.zeros(listed.num_positions, dtype=bool)
        self._by_first = Partitions(folder / "by-first", _DUPLICATE)
        self._described = Partitions(folder / "described", _DESCRIBED, has_texts=True)
        self._find(digests.read)

    def _find(self, read: ReadDigests) -> None:
        """Note every row but the first of its content."""
        num_rows = self._listed.num_positions
        num_partitions = -(-num_rows // _PARTITION_ROWS)
        by_content = Partitions(self._folder / "by-content", _NUMBERED)
        for start, stop in spans(num_rows, _CHUNK_ROWS):
            digests = read(start, stop)
            numbered = np.empty(stop - start, dtype=_NUMBERED)
            numbered["high"], numbered["low"] = digests["high"], digests["low"]
            numbered["row"] = np.arange(start, stop)
            numbered = numbered[(digests["high"] != 0) | (digests["low"] != 0)]
            by_content.add(_partition_of(numbered["high"], num_partitions, is_shuffled=True), numbered)
        for number in range(num_partitions):
            numbered, _ = by_content.take(number)
            firsts = first_of_each(numbered[["high", "low"]])
            later = np.flatnonzero(firsts != np.arange(len(firsts)))
            found = np.empty(len(later), dtype=_DUPLICATE)
            found["row"], found["first"] = numbered["row"][later], numbered["row"][firsts[later]]
            self._is_dropped[found["row"]] = True
            self._by_first.add(_chunk_of(found["first"]), found)
        (self._folder / "by-content").rmdir()

    def take_out(
        self, start: int, table: NDArray[np.void], names: Sequence[bytes], split: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """List the duplicates among some rows; to be called for all rows in order.

        Args:
            start: of the rows; a multiple of _CHUNK_ROWS.
            table: (N,) of ROW.
            names: of the rows.
            split: (N,) of each row.

        Returns:
            Which of the rows stay.
        """

        def place(row: int) -> str:
            return self._listed.source(int(table["source"][row - start])).describe(names[row - start])

        chunk = start // _CHUNK_ROWS
        firsts, _ = self._by_first.take(chunk)
        texts = [place(row).encode() for row in firsts["first"].tolist()]
        described = np.empty(len(firsts), dtype=_DESCRIBED)
        described["row"], described["size"] = firsts["row"], [len(text) for text in texts]
        self._described.add(_chunk_of(firsts["row"]), described, texts)
        # A duplicate's first is in this chunk or in one before it.
        described, all_texts = self._described.take(chunk)
        texts = cut(all_texts, described["size"])
        lines: dict[int, list[str]] = {}
        order = np.argsort(described["row"])
        rows: list[int] = described["row"][order].tolist()
        for row, text in zip(rows, chosen(texts, order), strict=True):
            detail = f"same bytes as {text.decode()}"
            line = {"key": None, "source": place(row), "reason": "duplicate", "detail": detail}
            lines.setdefault(int(split[row - start]), []).append(json.dumps(line, ensure_ascii=False) + "\n")
        self._write(lines)
        return np.flatnonzero(~self._is_dropped[start : start + len(table)])

    def _write(self, lines: dict[int, list[str]]) -> None:
        for number, some in lines.items():
            self._counts[number] += len(some)
            with (self._folder / duplicates_name(number)).open("a", encoding="utf-8") as file:
                file.writelines(some)

    def close(self) -> Counter[int]:
        """Return how many duplicates each split has."""
        for name in ("by-first", "described"):
            (self._folder / name).rmdir()
        assert self._counts.total() == self._is_dropped.sum()
        return self._counts


def _chunk_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (rows // np.uint64(_CHUNK_ROWS)).astype(np.int64)
