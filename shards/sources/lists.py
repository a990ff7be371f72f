"""Lists of images: text, CSV, TSV or JSON lines, or a bucket's CSV inventory."""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar, cast
from urllib.parse import unquote

from shards.config import Columns
from shards.ground.errors import PackError, RefusedError, Rejected
from shards.sources.base import Found, Input, Source, printable
from shards.sources.folder import read_file
from shards.storage.stores import SeekableFile, absolute, is_url, open_bytes, open_folder, split_url

__all__ = ["ListSource"]

_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "url", "key")
_LABELS = ("label", "class", "target", "class_name", "category", "label_name")


class ListSource:
    """Images that a list names, each by a path (absolute, or relative to the list) or a URL.

    Args:
        path: path or URL of the list.
        columns: which columns hold path and label.
        root: absolute path, for other processes.
        is_remote: some of the images are not on this machine.
        images: folder or address that relative paths begin at; None: where the list is.
    """

    kind: ClassVar[str] = "list"

    def __init__(
        self,
        path: str,
        columns: Columns | None = None,
        root: str = "",
        is_remote: bool | None = None,
        images: str | None = None,
    ) -> None:
        self.path = path
        self._columns = columns or Columns()
        self._root = root or absolute(path)
        self._base = split_url(self._root)[0] if images is None else absolute(images).rstrip("/")
        self.is_remote = is_url(self._base) if is_remote is None else is_remote

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {
            "kind": self.kind,
            "path": self.path,
            "root": self._root,
            "is_remote": self.is_remote,
            "images": self._base,
        }

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found]:
        """List what the list names, in its order."""
        del spool
        try:
            raw: IO[bytes] = io.BufferedReader(SeekableFile(open_bytes(self._root)))
            if self._root.lower().endswith(".gz"):
                raw = cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
            with raw:
                for path, label in self._entries(raw):
                    self.is_remote = self.is_remote or is_url(path)
                    folder = path.rpartition("/")[0].rpartition("/")[2] or None
                    yield Input(path.encode("utf-8", "surrogateescape"), folder, label)
        except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
            raise PackError(f"cannot read {self.path} to its end: {error}") from error

    def _entries(self, raw: IO[bytes]) -> Iterator[tuple[str, str | int | None]]:
        kind = self.path.lower().removesuffix(".gz").rpartition(".")[2]
        text = io.TextIOWrapper(cast("Any", raw), encoding="utf-8", errors="surrogateescape", newline="")
        if kind == "jsonl":
            return self._json_entries(text)
        if kind == "txt":
            return _text_entries(text)
        return self._csv_entries(csv.reader(text, delimiter="\t" if kind == "tsv" else ","))

    def _json_entries(self, text: Iterator[str]) -> Iterator[tuple[str, str | int | None]]:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                values: Any = json.loads(line)
                names = list(cast("dict[str, Any]", values))
            except (ValueError, TypeError):
                raise PackError(f"{self.path}, line {number}: not a JSON object") from None
            path, label = self._find(names)
            if path is None:
                raise PackError(f"{self.path}, line {number}: has no {_wanted(self._columns.image, _PATHS)}")
            value = values.get(label) if label is not None else None
            yield str(values[path]), value if isinstance(value, str | int) else None

    def _csv_entries(self, rows: Iterator[list[str]]) -> Iterator[tuple[str, str | int | None]]:
        first: list[str] = next(rows, list[str]())
        path, label = self._find(first)
        if path is not None:
            at, label_at = first.index(path), None if label is None else first.index(label)
        elif self._columns.image is not None:
            raise PackError(f"{self.path} has no column {self._columns.image!r}: it has {', '.join(first)}")
        elif self._is_inventory(first):
            for bucket, key, *_ in chain([first], rows):
                yield f"s3://{bucket}/{unquote(key)}", None
            return
        else:
            at, label_at = 0, 1 if len(first) > 1 else None
            if first:
                yield first[0], None if label_at is None else _number_or_name(first[1])
        for row in rows:
            if row:
                yield row[at], None if label_at is None or label_at >= len(row) else _number_or_name(row[label_at])

    def _is_inventory(self, first: list[str]) -> bool:
        """Return whether a list without a header line is S3's: bucket, key (quoted as in URLs), and more."""
        # A bucket's name may hold dots, but so do the names of files in a local list.
        bucket = r"[a-z0-9][a-z0-9.-]+" if self.path.startswith("s3://") else r"[a-z0-9][a-z0-9-]{2,}"
        return len(first) >= 2 and re.fullmatch(bucket, first[0]) is not None and "." in first[1]

    def _find(self, names: list[str]) -> tuple[str | None, str | None]:
        """Return the columns of path and label among some names."""
        path = next((n for n in ([self._columns.image] if self._columns.image else _PATHS) if n in names), None)
        label = next((n for n in ([self._columns.label] if self._columns.label else _LABELS) if n in names), None)
        return path, label

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of an image."""
        del offset, size
        path = os.fsdecode(name)
        if not is_url(path) and not is_url(self._base):
            return read_file(os.fsencode(Path(self._base) / path))
        url = path if is_url(path) else f"{self._base}/{path}"
        folder, base = split_url(url)
        try:
            return open_folder(folder).read(base)
        except FileNotFoundError:
            raise Rejected("unreadable", "no such object") from None
        except RefusedError as refused:
            raise Rejected("unreadable", refused.status) from None
        except PackError:
            raise
        except ValueError as error:
            raise Rejected("unreadable", str(error)) from None

    def describe(self, name: bytes) -> str:
        """Return the list's entry."""
        return printable(name)


def _wanted(chosen: str | None, usual: tuple[str, ...]) -> str:
    return repr(chosen) if chosen else f"path: looked for {', '.join(usual)}; name it with --image-column"


def _number_or_name(text: str) -> str | int | None:
    return int(text) if text.isdecimal() else text or None


def _text_entries(text: Iterator[str]) -> Iterator[tuple[str, str | int | None]]:
    for line in text:
        path, tab, label = line.rstrip("\r\n").partition("\t")
        if path:
            yield path, _number_or_name(label) if tab else None
