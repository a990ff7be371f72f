"""MDS shards, which mosaicml-streaming writes, read by ranges and without it.

    number of samples   u32
    offsets             u32 of each sample, and of the end
    configuration       JSON: names, encodings and fixed sizes of the columns, in the order of their bytes
    samples             u32 size of each column whose size is not fixed, then the columns' bytes

All numbers are little-endian. Source: mosaicml/streaming at 89e7bb9, streaming/base/format/mds/writer.py.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from shards.storage.stores import SeekableFile
from shards.storage.tfrecord import RecordError

__all__ = ["MdsColumn", "MdsShard", "decoded", "raw_picture"]

_SCALARS = re.compile(r"u?int(?:8|16|32|64)|float(?:16|32|64)")


class MdsColumn(NamedTuple):
    """One column of every sample."""

    name: str
    encoding: str
    size: int | None
    """Bytes, if they are always as many."""


class MdsShard:
    """One shard.

    Args:
        reader: its file.

    Raises:
        RecordError: not a whole MDS shard, or more than one.
    """

    def __init__(self, reader: SeekableFile) -> None:
        self._reader = reader
        size = reader.file.size
        num_samples = int.from_bytes(reader.read_at(0, 4), "little")
        directory = 4 * (num_samples + 2)
        if directory >= size:
            raise RecordError(f"is not an MDS shard, or cut: {num_samples} samples do not fit into {size} bytes")
        offsets: Any = np.frombuffer(reader.read_at(4, directory - 4), dtype="<u4").astype(np.int64)
        if offsets[0] < directory or (np.diff(offsets) < 0).any():
            raise RecordError("is not an MDS shard, or damaged: its offsets do not rise")
        if offsets[-1] > size:
            raise RecordError(f"is cut: it ends at byte {size} of {offsets[-1]}")
        if offsets[-1] < size:
            raise RecordError(f"goes on for {size - offsets[-1]} bytes behind its last sample, at byte {offsets[-1]}")
        self._offsets: list[int] = offsets.tolist()
        self.columns = _columns(reader.read_at(directory, self._offsets[0] - directory))

    def samples(self) -> Iterator[dict[str, tuple[int, int]]]:
        """Return (offset, size) of each column, by its name, of each sample. Raises RecordError."""
        num_sizes = sum(column.size is None for column in self.columns)
        for start, stop in pairwise(self._offsets):
            written: Any = np.frombuffer(self._reader.read_at(start, min(4 * num_sizes, stop - start)), dtype="<u1")
            if len(written) < 4 * num_sizes:
                raise RecordError(f"has a sample at byte {start} that is shorter than its sizes")
            sizes = iter(written.view("<u4").tolist())
            at, found = start + 4 * num_sizes, dict[str, tuple[int, int]]()
            for column in self.columns:
                size = next(sizes) if column.size is None else column.size
                found[column.name] = (at, size)
                at += size
            if at != stop:
                raise RecordError(f"has a sample at byte {start} whose columns do not fill it")
            yield found


def _columns(data: bytes) -> list[MdsColumn]:
    try:
        config: Any = json.loads(data)
        columns = zip(config["column_names"], config["column_encodings"], config["column_sizes"], strict=True)
        return [MdsColumn(str(name), str(encoding), None if n is None else int(n)) for name, encoding, n in columns]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"is not an MDS shard, or damaged: its configuration cannot be read ({error})") from None


def decoded(data: bytes, encoding: str) -> Any:
    """Return the value of a column that is a number or a text.

    Raises:
        ValueError: its encoding has no such values, or the bytes are others.
    """
    if encoding in ("str", "bytes", "str_int", "str_float", "str_decimal"):
        text = data.decode("utf-8", "backslashreplace")
        return text if encoding in ("str", "bytes") else float(text) if encoding != "str_int" else int(text)
    if encoding == "json":
        return json.loads(data)
    if encoding == "int":
        return int.from_bytes(data, "little", signed=True)
    if _SCALARS.fullmatch(encoding):
        return np.frombuffer(data, dtype=np.dtype(encoding).newbyteorder("<"))[0].item()
    raise ValueError(f"its encoding is {encoding}")


def raw_picture(data: bytes) -> bytes:
    """Return what the encoding `pil` stores (width, height, size of the mode's name, mode, pixels) as a PNM file.

    Raises:
        ValueError: pixels of another kind than gray or RGB, or cut.
    """
    width, height, size = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4, 8))
    mode, pixels = data[12 : 12 + size], data[12 + size :]
    if mode not in (b"L", b"RGB"):
        raise ValueError(f"raw pixels of mode {mode[:20]!r}, of which only L and RGB are read")
    if len(pixels) != width * height * (1 if mode == b"L" else 3):
        raise ValueError(f"{len(pixels)} bytes of pixels do not make {width} x {height}")
    return b"P%c\n%d %d\n255\n" % (b"5" if mode == b"L" else b"6", width, height) + pixels
