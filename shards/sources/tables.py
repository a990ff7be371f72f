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
from shards.sources.values import USUAL_COLUMNS, USUAL_IMAGES, as_label, column_of
from shards.storage.stores import SeekableFile, absolute, is_url, open_bytes

__all__ = ["TableSource"]

_ROWS_PER_BATCH = 64
_ARROW = b"ARROW1"
_MOST_FOOTER_BYTES = 16 << 20


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
            image = column_of(self.path, schema.names, self._columns.image, USUAL_IMAGES, is_image=True) or ""
            label = column_of(self.path, schema.names, self._columns.label, USUAL_COLUMNS, is_image=False)
            if label is not None:
                self._label_from = f"column {label}"
            if not self._options.labeled:
                label = None
            names = _class_names(schema.metadata, label)
            _refuse_type(self.path, image, schema.field(image).type)
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
    if file.read_at(0, 6) == _ARROW:
        # The whole schema is in the footer too: one that was cut is refused before anything is read.
        pa.ipc.open_file(wrapped)
        file.seek(8)
    stream: Any = pa.ipc.open_stream(wrapped)
    return lambda _: _all_streams(stream, wrapped, file, path), stream.schema


def _all_streams(stream: Any, wrapped: Any, file: SeekableFile, path: str) -> Iterator[Any]:
    """Return the batches of a stream, and of those behind it where files were joined.

    Files for random access are streams too, between a mark and a footer; read by the last footer alone, those that were
    joined would give the first one's batches in place of the last one's.
    """
    yield from stream
    while True:
        _skip_footer(file)
        if file.tell() >= file.file.size:
            return
        if file.read_at(file.tell(), 6) == _ARROW:
            file.seek(8, os.SEEK_CUR)
        following = import_module("pyarrow").ipc.open_stream(wrapped)
        if following.schema != stream.schema:
            raise PackError(f"{path} is several Arrow files joined, whose columns differ: give them apart")
        yield from following


def _skip_footer(file: SeekableFile) -> None:
    """Go behind the footer, its size and the mark that end a file for random access, if these are here."""
    at = file.tell()
    found = file.read_at(at, _MOST_FOOTER_BYTES)
    end = found.find(_ARROW)
    while end >= 0:
        if end >= 4 and int.from_bytes(found[end - 4 : end], "little") == end - 4:
            file.seek(at + end + len(_ARROW))
            return
        end = found.find(_ARROW, end + 1)


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


def _refuse_type(path: str, column: str, kind: Any) -> None:
    """Refuse a column of pixels or of lists of images: each of its cells would count as empty. Raises ValueError."""
    types: Any = import_module("pyarrow.types")
    kind = kind.value_type if types.is_dictionary(kind) else kind
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    named = {each.name for each in kind} if types.is_struct(kind) else set[str]()
    if not any(check(kind) for check in (*binary, *text)) and not named & {"bytes", "path"}:
        raise ValueError(
            f"{path}, column {column}, holds {str(kind)[:60]}, not encoded images or paths: write it with one encoded "
            "image per row, or name another column with --image-column"
        )


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return fields.get("bytes"), fields.get("path")
    return (value, None) if isinstance(value, bytes) else (None, value if isinstance(value, str) else None)
