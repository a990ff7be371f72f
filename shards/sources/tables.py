"""Parquet and Arrow files as Hugging Face datasets lay them out."""

import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.sources.base import Input, LabelSet, Source, printable
from shards.sources.folder import read_file
from shards.sources.values import as_label
from shards.storage.stores import SeekableFile, absolute, is_url, open_bytes

__all__ = ["TableSource"]

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_LABELS = ("label", "labels", "cls", "class", "target", "fine_label")
_ROWS_PER_BATCH = 64


class TableSource:
    """Rows of one file: images as `{bytes, path}` or as plain bytes.

    Single rows cannot be read from compressed pages, so listing copies the images' bytes into the plan's folder.

    Args:
        path: path or URL.
        options: what is wanted.
        spool: the copied bytes.
        root: absolute path, for other processes.
    """

    is_remote = False

    def __init__(
        self, path: str, options: SourceOptions | None = None, spool: Path | None = None, root: str = ""
    ) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._columns = self._options.columns
        self._spool = spool
        self._root = root or absolute(path)
        self._label_from = ""

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        assert self._spool is not None
        return {"kind": "table", "path": self.path, "root": self._root, "spool": self._spool.name}

    def inputs(self, spool: Path) -> Iterator[Input | Source]:
        """List the rows and copy their images."""
        self._spool = spool
        try:
            import_module("pyarrow")
        except ImportError:
            raise ValueError(f"{self.path} needs pyarrow: install it with `pip install 'moco-fast[parquet]'`") from None
        row, at = 0, 0
        with spool.open("wb") as target:
            for data, path, label in self._rows():
                if data is None:
                    name = b"row %d" % row if path is None else b"path " + path.encode("utf-8", "surrogateescape")
                    yield Input(name, None, label, label_from=self._label_from)
                else:
                    target.write(data)
                    yield Input(b"row %d" % row, None, label, at, len(data), self._label_from)
                    at += len(data)
                row += 1

    def _rows(self) -> Iterator[tuple[bytes | None, str | None, LabelSet | str | int | None]]:
        """Return (bytes, path, label) of each row."""
        try:
            batches, schema = _open_table(SeekableFile(open_bytes(self._root)), self._root)
            image = self._column(schema.names, self._columns.image, _IMAGES)
            label = self._column(schema.names, self._columns.label, _LABELS, needed=False)
            if label is not None:
                self._label_from = f"column {label}"
            if not self._options.labeled:
                label = None
            names = _class_names(schema.metadata, label)
            for batch in batches([image] if label is None else [image, label]):
                images = batch.column(image).to_pylist()
                labels = [None] * len(images) if label is None else batch.column(label).to_pylist()
                for value, own in zip(images, labels, strict=True):
                    yield *_bytes_and_path(value), self._label(own, names, label, schema.names)
        except ValueError as error:
            # pyarrow's own errors are ValueErrors too.
            if type(error).__module__.startswith("pyarrow"):
                raise PackError(f"{self.path} cannot be read to its end: {error}") from error
            raise
        except OSError as error:
            raise PackError(f"{self.path} cannot be read to its end: {error}") from error

    def _column(self, names: list[str], chosen: str | None, usual: tuple[str, ...], *, needed: bool = True) -> Any:
        found = next((name for name in ([chosen] if chosen else usual) if name in names), None)
        if found is None and (needed or chosen):
            option = "--image-column" if needed else "--label-column"
            raise ValueError(f"{self.path} has columns {', '.join(names)}: name the right one with {option}")
        return found

    def _label(
        self, value: Any, names: list[str], column: str | None, columns: list[str]
    ) -> LabelSet | str | int | None:
        try:
            return as_label(value, names)
        except ValueError as error:
            raise ValueError(
                f"{self.path}, column {column}: {error}; it has columns {', '.join(columns)}: name that of labels "
                "with --label-column, or use --labels none"
            ) from None

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of a row's image."""
        assert self._spool is not None
        if offset >= 0:
            return open_bytes(str(self._spool)).read(offset, size)
        if name.startswith(b"path ") and not is_url(self._root):
            return read_file(os.fsencode(Path(self._root).parent / os.fsdecode(name[5:])))
        raise Rejected("empty", "the row has no image")

    def describe(self, name: bytes) -> str:
        """Return the path of the file and number of the row."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def _open_table(file: SeekableFile, path: str) -> tuple[Callable[[list[str]], Iterator[Any]], Any]:
    """Return what gives the batches of some columns, and the schema."""
    pa: Any = import_module("pyarrow")
    wrapped = pa.PythonFile(file, mode="r")
    if file.read_at(0, 4) == b"PAR1":
        parquet: Any = import_module("pyarrow.parquet").ParquetFile(wrapped)
        _refuse_joined(file, parquet.metadata, path)
        return lambda columns: parquet.iter_batches(_ROWS_PER_BATCH, columns=columns), parquet.schema_arrow
    if file.read_at(0, 6) == b"ARROW1":
        arrow: Any = pa.ipc.open_file(wrapped)
        return lambda _: (arrow.get_batch(i) for i in range(arrow.num_record_batches)), arrow.schema
    stream: Any = pa.ipc.open_stream(wrapped)
    return lambda _: _all_streams(stream, wrapped, file), stream.schema


def _all_streams(stream: Any, wrapped: Any, file: SeekableFile) -> Iterator[Any]:
    """Return the batches of a stream, and of those behind it where files were joined."""
    yield from stream
    while file.tell() < file.file.size:
        yield from import_module("pyarrow").ipc.open_stream(wrapped)


def _refuse_joined(file: SeekableFile, metadata: Any, path: str) -> None:
    """Refuse Parquet files that were joined, of which only the last one would be read. Raises PackError."""
    size = file.file.size
    directory = size - 8 - int.from_bytes(file.read_at(size - 8, 4), "little")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(metadata.num_columns))
    ends = (
        min(each.data_page_offset, each.dictionary_page_offset or each.data_page_offset) + each.total_compressed_size
        for each in columns
    )
    end = max(ends, default=4)
    if end < directory and b"PAR1PAR1" in file.read_at(end - 8, directory - end + 8):
        raise PackError(f"{path} is several Parquet files joined: give them apart, since only the last would be read")


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str]:
    """Return the names of a ClassLabel, which the `datasets` library writes into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        feature: Any = features[label]
        # Of several labels: a sequence of them, written in either way.
        inner: Any = cast("list[Any]", feature)[0] if isinstance(feature, list) else feature.get("feature", feature)
        return [str(name) for name in inner["names"]]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return []


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return fields.get("bytes"), fields.get("path")
    return (value, None) if isinstance(value, bytes) else (None, value if isinstance(value, str) else None)
