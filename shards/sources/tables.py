"""Parquet and Arrow files as Hugging Face datasets lay them out."""

import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from shards.config import Columns
from shards.ground.errors import PackError, Rejected
from shards.sources.base import Input, Source, printable
from shards.sources.folder import read_file
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
        columns: which columns hold image and label.
        spool: the copied bytes.
        root: absolute path, for other processes.
    """

    is_remote = False

    def __init__(self, path: str, columns: Columns | None = None, spool: Path | None = None, root: str = "") -> None:
        self.path = path
        self._columns = columns or Columns()
        self._spool = spool
        self._root = root or absolute(path)

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
                    yield Input(name, None, label)
                else:
                    target.write(data)
                    yield Input(b"row %d" % row, None, label, at, len(data))
                    at += len(data)
                row += 1

    def _rows(self) -> Iterator[tuple[bytes | None, str | None, str | int | None]]:
        """Return (bytes, path, label) of each row."""
        try:
            batches, schema = _open_table(SeekableFile(open_bytes(self._root)), self._root)
            image = self._column(schema.names, self._columns.image, _IMAGES)
            label = self._column(schema.names, self._columns.label, _LABELS, needed=False)
            names = _class_names(schema.metadata, label)
            for batch in batches([image] if label is None else [image, label]):
                images = batch.column(image).to_pylist()
                labels = [None] * len(images) if label is None else batch.column(label).to_pylist()
                for value, own in zip(images, labels, strict=True):
                    yield *_bytes_and_path(value), _label(own, names)
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
    if path.lower().endswith(".parquet"):
        parquet: Any = import_module("pyarrow.parquet").ParquetFile(wrapped)
        return lambda columns: parquet.iter_batches(_ROWS_PER_BATCH, columns=columns), parquet.schema_arrow
    if file.read_at(0, 6) == b"ARROW1":
        arrow: Any = pa.ipc.open_file(wrapped)
        return lambda _: (arrow.get_batch(i) for i in range(arrow.num_record_batches)), arrow.schema
    stream: Any = pa.ipc.open_stream(wrapped)
    return lambda _: iter(stream), stream.schema


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str]:
    """Return the names of a ClassLabel, which the `datasets` library writes into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return fields.get("bytes"), fields.get("path")
    return (value, None) if isinstance(value, bytes) else (None, value if isinstance(value, str) else None)


def _label(value: Any, names: list[str]) -> str | int | None:
    if isinstance(value, int) and names:
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, int):
        return value if value >= 0 else None
    return value if isinstance(value, str) else None
