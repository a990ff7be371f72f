"""Lists of images: text, CSV, TSV or JSON lines, or a bucket's CSV inventory."""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar, cast
from urllib.parse import unquote

from shards.config import SourceOptions
from shards.ground.errors import PackError, RefusedError, Rejected
from shards.sources.base import Aside, Found, Input, Source, folder_of, printable
from shards.sources.folder import read_file
from shards.sources.values import as_label, number_or_name
from shards.storage.file_kinds import IMAGE_SUFFIXES
from shards.storage.stores import SeekableFile, absolute, is_url, open_bytes, open_folder, split_url

__all__ = ["ListSource"]

_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "url", "key")
_LABELS = ("label", "class", "target", "class_name", "category", "label_name")
_WORD = re.compile(r" *[A-Za-z_][A-Za-z_ ]*")
# As Caffe's tools and many scripts write it; a name may hold spaces, so it must end as images do.
_LABEL_BEHIND_SPACE = re.compile(rf"(.+\.(?:{'|'.join(sorted(IMAGE_SUFFIXES))})) +(-?[0-9]+)", re.IGNORECASE)


class ListSource:
    """Images that a list names, each by a path (absolute, or relative to the list) or a URL.

    Args:
        path: path or URL of the list.
        options: what is wanted.
        root: absolute path, for other processes.
        is_remote: some of the images are not on this machine.
        images: folder or address that relative paths begin at; None: that of the options, or where the list is.
    """

    kind: ClassVar[str] = "list"

    def __init__(
        self,
        path: str,
        options: SourceOptions | None = None,
        root: str = "",
        is_remote: bool | None = None,
        images: str | None = None,
    ) -> None:
        self.path = path
        options = options or SourceOptions()
        self._columns = options.columns
        self._labeled = options.labeled
        self._root = root or absolute(path)
        images = images or options.image_root
        self._base = split_url(self._root)[0] if images is None else absolute(images).rstrip("/")
        self.is_remote = is_url(self._base) if is_remote is None else is_remote
        self._label_from = ""

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {
            "kind": self.kind,
            "path": self.path,
            "root": self._root,
            "is_remote": self.is_remote,
            "images": self._base,
        }

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found | Aside]:
        """List what the list names, in its order."""
        del spool
        try:
            raw: IO[bytes] = io.BufferedReader(SeekableFile(open_bytes(self._root)))
            if self._root.lower().endswith(".gz"):
                raw = cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
            with raw:
                for number, path, value in self._entries(raw):
                    self.is_remote = self.is_remote or is_url(path)
                    try:
                        label = as_label(value) if self._labeled else None
                    except ValueError as error:
                        raise ValueError(
                            f"{self.path}, line {number}: {error}; name the column of labels with --label-column, or "
                            "use --labels none"
                        ) from None
                    name = path.encode("utf-8", "surrogateescape")
                    # A bucket or a server is not a folder.
                    inside = name.partition(b"://")[2].partition(b"/")[2] if is_url(path) else name
                    yield Input(name, folder_of(inside), label, label_from=self._label_from)
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            raise PackError(f"cannot read {self.path} to its end: {error}") from error

    def _entries(self, raw: IO[bytes]) -> Iterator[tuple[int, str, Any]]:
        """Return number of the line, path and label of each entry."""
        kind = self.path.lower().removesuffix(".gz").rpartition(".")[2]
        # Spreadsheets write a mark of the encoding in front.
        is_utf16 = cast("Any", raw).peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if is_utf16 else "utf-8-sig"
        text = io.TextIOWrapper(cast("Any", raw), encoding=encoding, errors="surrogateescape", newline="")
        if kind == "jsonl":
            return self._json_entries(text)
        if kind == "txt":
            return self._text_entries(text)
        first = text.readline()
        between = "\t" if kind == "tsv" else _between(first)
        return self._csv_entries(csv.reader(chain([first], text), delimiter=between))

    def _text_entries(self, text: Iterator[str]) -> Iterator[tuple[int, str, str | int | None]]:
        for number, line in enumerate(text, 1):
            path, tab, label = line.rstrip("\r\n").partition("\t")
            if not tab and (both := _LABEL_BEHIND_SPACE.fullmatch(path)) is not None:
                path, label = both.groups()
            if tab or label:
                self._label_from = "text behind a tab" if tab else "number behind a space"
            if path:
                yield number, path, number_or_name(label)

    def _json_entries(self, text: Iterator[str]) -> Iterator[tuple[int, str, Any]]:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                values: Any = json.loads(line)
                names = list(cast("dict[str, Any]", values).keys())
            except (ValueError, AttributeError):
                raise PackError(f"{self.path}, line {number}: not a JSON object") from None
            path, label = self._find(names)
            if path is None:
                raise PackError(f"{self.path}, line {number}: has no {_wanted(self._columns.image, _PATHS)}")
            if not isinstance(values[path], str | int) or values[path] == "":
                raise PackError(f"{self.path}, line {number}: {path} is {str(values[path])[:60]!r}, not a path")
            yield number, str(values[path]), values.get(label) if label is not None else None

    def _csv_entries(self, rows: Any) -> Iterator[tuple[int, str, Any]]:
        lines: Iterator[tuple[int, list[str]]] = ((rows.line_num, row) for row in rows)
        number, first = next(lines, (1, list[str]()))
        path, label = self._find(first)
        at, label_at = 0, None
        if path is not None:
            at, label_at = first.index(path), None if label is None else first.index(label)
        elif self._columns.image is not None:
            raise self._has_no(self._columns.image, first)
        elif self._is_inventory(first):
            for line, (bucket, key, *_) in chain([(number, first)], lines):
                yield line, f"s3://{bucket}/{unquote(key)}", None
            return
        elif first:
            second = next(lines, (0, list[str]()))
            self._refuse_order(first, second[1])
            lines = chain([(number, first), second], lines)
            label_at, self._label_from = (1, "second column") if len(first) > 1 else (None, "")
        if path is not None and label is None and self._columns.label is not None:
            raise self._has_no(self._columns.label, first)
        for line, row in lines:
            if not any(row):
                continue
            if at >= len(row) or not row[at]:
                raise PackError(
                    f"{self.path}, line {line}: {', '.join(row)[:80]!r} has no path in column {at + 1}: "
                    "repair the list, or remove the line"
                )
            value = None if label_at is None or label_at >= len(row) else number_or_name(row[label_at])
            yield line, row[at], value

    def _has_no(self, column: str, first: Sequence[str]) -> PackError:
        return PackError(f"{self.path} has no column {column!r}: it has {', '.join(first)}")

    def _refuse_order(self, first: Sequence[str], second: Sequence[str]) -> None:
        """Refuse a list without usual names above it that begins with other names, or whose paths come second."""
        if len(first) > 1 and not self._is_here(first[0]) and self._is_here(first[1]):
            raise PackError(
                f"{self.path}, line 1: {', '.join(first)[:80]!r} has its path in column 2: put a line of names above "
                "the list, such as `label,path`"
            )
        if len(first) > 1 and second and all(map(_WORD.fullmatch, first)) and not _WORD.fullmatch(second[0]):
            raise PackError(
                f"{self.path} begins with {', '.join(first)[:80]!r}: if these are names of columns, say which hold "
                "path and label with --image-column and --label-column; if not, put the line `path,label` above it"
            )

    def _is_here(self, path: str) -> bool:
        return not is_url(self._base) and not is_url(path) and "\0" not in path and Path(self._base, path).is_file()

    def _is_inventory(self, first: list[str]) -> bool:
        """Return whether a list without a header line is S3's: bucket, key (quoted as in URLs), and more."""
        # A bucket's name may hold dots, but so do the names of files in a local list.
        bucket = r"[a-z0-9][a-z0-9.-]+" if self.path.startswith("s3://") else r"[a-z0-9][a-z0-9-]{2,}"
        looks_so = len(first) >= 2 and re.fullmatch(bucket, first[0]) is not None and "." in first[1]
        return looks_so and not any(map(self._is_here, first[:2]))

    def _find(self, names: list[str]) -> tuple[str | None, str | None]:
        """Return the columns of path and label among some names."""
        by_name = {name.strip().lower(): name for name in reversed(names)} | {name: name for name in names}
        paths = [self._columns.image] if self._columns.image else _PATHS
        labels = [self._columns.label] if self._columns.label else _LABELS
        path, label = (next((by_name[n] for n in some if n in by_name), None) for some in (paths, labels))
        self._label_from = f"column {label}"
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


def _between(first: str) -> str:
    """Return what separates the columns of a CSV: spreadsheets of many countries write semicolons."""
    return next((mark for mark in ";\t" if mark in first and "," not in first), ",")
