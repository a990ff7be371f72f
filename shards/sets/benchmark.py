"""Files of a benchmark in a set of shards, each under its path in the benchmark (`make-shards pack --annotations`)."""

import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from shards.ground.digests import crc32c, digest
from shards.ground.errors import PackError
from shards.sets.base import ShardSet
from shards.sets.record import ANNOTATED
from shards.sets.registry import may_be_set, open_set
from shards.sets.shard_file import ShardFile
from shards.storage.file_kinds import FILES_FOLDER, FILES_NAME, FILES_SUFFIX
from shards.storage.stores import SeekableFile

__all__ = ["AnyPath", "BenchmarkFiles", "PackedFile", "PackedPath", "open_benchmark"]

_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file in a shard, or beside the shards."""

    shard: int
    """-1: beside them."""
    offset: int
    size: int
    check: int | str
    """CRC-32C, or xxh3_128 in hex of what is beside the shards."""
    image: tuple[int, int, int] | None = None
    """Width, height and orientation of one of the set's images, as its header has them."""


class BenchmarkFiles:
    """All files of a benchmark in a set.

    Args:
        shards: a set that was packed with annotations.

    Raises:
        ValueError: the set's tables are damaged, or the store does not answer.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._open_shard = lru_cache(maxsize=256)(shards.open_shard)

    @cached_property
    def files(self) -> dict[str, PackedFile]:
        """By path."""
        found: dict[str, PackedFile] = {}
        for shard, entry in enumerate(self.shards.manifest.shards):
            name = f"{entry.stem}{FILES_SUFFIX}"
            data = self.shards.read_beside(name)
            if digest(data) != entry.digests.get(FILES_SUFFIX):
                raise ValueError(self._damaged(name))
            for told in map(json.loads, data.splitlines()):
                image = (told["width"], told["height"], told["orientation"]) if "orientation" in told else None
                found[told["path"]] = PackedFile(
                    shard=shard, offset=told["offset"], size=told["size"], check=told["crc32c"], image=image
                )
        try:
            for told in map(json.loads, self.shards.read_beside(FILES_NAME).splitlines()):
                found[told["path"]] = PackedFile(shard=-1, offset=0, size=told["size"], check=told["xxh3_128"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(self._damaged(FILES_NAME)) from None
        return found

    @cached_property
    def folders(self) -> dict[str, dict[str, None]]:
        """Names of what is in each folder, files and folders, by its path; that of the root is empty."""
        found: dict[str, dict[str, None]] = {"": {}}
        for path in self.files:
            while path:
                folder, _, name = path.rpartition("/")
                is_known = folder in found
                found.setdefault(folder, {})[name] = None
                if is_known:
                    break
                path = folder
        return found

    def read(self, path: str) -> bytes:
        """Return a file's bytes, checked.

        Raises:
            FileNotFoundError: there is none.
            OSError: an image has changed since it was packed.
            PackError: another file has, or the store does not answer.
        """
        file = self._file(path)
        if file.shard < 0:
            data = self.shards.read_beside(f"{FILES_FOLDER}/{path}")
            is_whole = digest(data) == file.check
        else:
            data = self.read_range(file, 0, file.size)
            is_whole = crc32c(data) == file.check
        if not is_whole:
            where = f"files/{path}" if file.shard < 0 else f"{self.shards.shard_name(file.shard)}: {path}"
            # One image may be replaced by another; what is marked in it may not.
            raise (PackError if file.image is None else OSError)(self._damaged(where))
        return data

    def read_range(self, file: PackedFile, start: int, count: int) -> bytes:
        """Return some bytes of a file in a shard, fewer at its end; unchecked."""
        buffer = np.empty(max(0, min(count, file.size - start)), dtype=np.uint8)
        opened: ShardFile = self._open_shard(file.shard)
        return buffer[: opened.read_into(buffer, file.offset + start)].tobytes()

    def open(self, path: str) -> BinaryIO:
        """Open a file, of which a reader that looks at the header alone reads no more than that."""
        file = self._file(path)
        if file.shard < 0 or file.size <= _HEADER_BYTES:
            return io.BytesIO(self.read(path))
        return io.BufferedReader(SeekableFile(_InShard(self, file), window=_HEADER_BYTES))

    def _file(self, path: str) -> PackedFile:
        try:
            return self.files[path]
        except KeyError:
            raise FileNotFoundError(2, "not in the set", f"{self.shards.where}/{path}") from None

    def _damaged(self, what: str) -> str:
        where = self.shards.where
        return f"{where}: {what} has changed since it was packed: restore it, or run `make-shards verify {where}`"


class _InShard:
    """A file in a shard, as `SeekableFile` reads it."""

    def __init__(self, files: BenchmarkFiles, file: PackedFile) -> None:
        self._files, self._file, self.size = files, file, file.size

    def read(self, start: int, count: int) -> bytes:
        """Return bytes, fewer at the end."""
        return self._files.read_range(self._file, start, count)


@dataclass(frozen=True)
class PackedPath:
    """A path in a benchmark in shards, with as much of `pathlib.Path` as reading a layout needs."""

    where: str
    """The set."""
    inner: str
    """The path; empty: the benchmark's folder."""

    @property
    def files(self) -> BenchmarkFiles:
        """The set's files."""
        return _opened(self.where)

    def __truediv__(self, name: str) -> "PackedPath":
        # Annotations may name an image as ../train2017/000000000009.jpg.
        path = posixpath.normpath(PurePosixPath(self.inner, name))
        return PackedPath(self.where, "" if path == "." else path)

    def __lt__(self, other: "PackedPath") -> bool:
        # As pathlib sorts: part by part.
        return (self.where, self.inner.split("/")) < (other.where, other.inner.split("/"))

    def __str__(self) -> str:
        return f"{self.where}/{self.inner}".rstrip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.inner).name

    @property
    def stem(self) -> str:
        """The last part without what follows its last dot."""
        return PurePosixPath(self.inner).stem

    @property
    def parent(self) -> "PackedPath":
        """The folder that it is in."""
        return PackedPath(self.where, self.inner.rpartition("/")[0])

    @property
    def parents(self) -> tuple["PackedPath", ...]:
        """The folders that it is in, the innermost first."""
        return () if not self.inner else (self.parent, *self.parent.parents)

    def resolve(self) -> "PackedPath":
        """Return the path itself: there are no links."""
        return self

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.inner in self.files.files

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.inner in self.files.folders

    def exists(self) -> bool:
        """Whether it is one of the two."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["PackedPath"]:
        """Give what is in a folder."""
        return (self / name for name in self.files.folders.get(self.inner, ()))

    def glob(self, pattern: str) -> Iterator["PackedPath"]:
        """Give what fits a pattern of as many parts as it has itself, without `**`."""
        first, _, rest = pattern.partition("/")
        for each in self.iterdir():
            if fnmatchcase(each.name, first):
                yield from each.glob(rest) if rest else (each,)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it for reading. Raises as `BenchmarkFiles.read`."""
        assert mode == "rb"
        return self.files.open(self.inner)

    def read_bytes(self) -> bytes:
        """Return its bytes, checked. Raises as `BenchmarkFiles.read`."""
        return self.files.read(self.inner)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return its text. Raises as `read_bytes`, and UnicodeDecodeError."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding).read()

    def stat(self) -> Any:
        """Return its `st_size`. Raises FileNotFoundError."""
        return SimpleNamespace(st_size=self.files._file(self.inner).size)  # pyright: ignore[reportPrivateUsage] - a path of these files

    def image_header(self) -> tuple[int, int, int] | None:
        """Return width, height and orientation of an image of the set, without reading it. Raises FileNotFoundError."""
        return self.files._file(self.inner).image  # pyright: ignore[reportPrivateUsage] - a path of these files


AnyPath = Path | PackedPath
"""A file of a benchmark on disk, or in shards."""


@lru_cache(maxsize=8)
def _opened(where: str) -> BenchmarkFiles:
    shards = open_set(where)
    if shards.kind == "merged":
        raise ValueError(f"{where}: benchmarks in several sets are given with spaces between them, not with commas")
    if not shards.manifest.settings.get(ANNOTATED):
        raise ValueError(
            f"{where} is a set of shards without annotations: give the benchmark's folder, or pack that with "
            "`make-shards pack FOLDER --annotations`"
        )
    return BenchmarkFiles(shards)


def open_benchmark(folder: "str | AnyPath") -> AnyPath:
    """Return the root of a benchmark: a folder as it is published, or a set of shards that it was packed into.

    Raises:
        ValueError: a set of shards that was packed without annotations, is not whole, or does not answer.
    """
    if not isinstance(folder, str):
        return folder
    if not may_be_set(folder):
        return Path(folder)
    path = PackedPath(folder.rstrip("/"), "")
    _ = path.files.files
    return path
