"""Folders of class folders as sets: packed once into the cache, and found there from then on.

They are kept below CACHE/sets (room.py), by a digest of what the folder holds: names, sizes and times of its files.
"""

import json
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moco_fast.evaluation.room import SETS_FOLDER, beside, make_room
from shards.config import PackConfig
from shards.ground.digests import short_digest
from shards.ground.files import appearing, write_whole
from shards.ground.locks import locked, take_lock
from shards.ground.progress import ProgressBars
from shards.ground.units import counted
from shards.packing.pack import pack
from shards.sets import ShardSet, open_set
from shards.sets.manifest import MANIFEST_NAME, Manifest, find_tars
from shards.sets.registry import may_be_set

__all__ = ["may_be_data", "open_data"]

_FORMAT = 1
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_MAX_REJECTED = 0.05


class _File(NamedTuple):
    """A file below a folder of class folders."""

    path: str
    """Relative to it, with `/`."""
    size: int
    mtime_ns: int

    @property
    def label(self) -> str:
        """Its class: the first folder."""
        return self.path.partition("/")[0]


def _is_class_folders(where: str) -> bool:
    """Whether a path is a folder on this machine that neither holds shards nor was begun to be packed into."""
    folder = Path(where)
    if may_be_set(where) or not folder.is_dir() or find_tars(where):
        return False
    return not (folder / ".pack").exists() and not any(folder.glob(f"*/{MANIFEST_NAME}"))


def may_be_data(where: str) -> bool:
    """Whether `open_data` may find something at a path or an address."""
    return may_be_set(where) or _is_class_folders(where)


def open_data(where: str, *, cache: Path, limit_gib: float | None = None) -> ShardSet:
    """Open a set of shards, or a folder of class folders, which is packed into the cache the first time.

    A class is a folder right below `where`; its images may be in folders of their own. Any process may ask for it: one
    packs, the others wait.

    Args:
        where: as `shards.open` takes it, or the folder.
        cache: folder of the cache of features, below which sets are kept.
        limit_gib: size that the cache may grow to.

    Raises:
        ValueError: there is no such set, no image in the folder, or no class folders; or more than 5% of the files
            cannot be read as images.
        OSError: the cache's disk is full.
    """
    if not _is_class_folders(where):
        return open_set(where)
    files = _listed(where)
    digest = short_digest(json.dumps([_FORMAT, *files]).encode())
    final = cache / SETS_FOLDER / digest
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(beside(final, "lock"), holder=where, wait=True):
        used = take_lock(beside(final, "used"), holder=where, shared=True, wait=True)
        try:
            if not (final / MANIFEST_NAME).is_file():
                make_room(cache, sum(file.size for file in files), limit_gib=limit_gib)
                manifest = _pack(where, files, final)
                print(_line(where, manifest, final), file=sys.stderr)
            os.utime(final / MANIFEST_NAME)
            found = open_set(final)
        except BaseException:
            os.close(used)
            raise
    weakref.finalize(found, os.close, used)
    return found


def _listed(where: str) -> list[_File]:
    """Return the files of all classes, sorted by path. Raises ValueError: it is not a folder of class folders."""
    files = sorted(file for entry in _entries(where) if entry.is_dir() for file in _below(where, entry.name))
    labels = {file.label for file in files}
    if not files:
        flat = sum(1 for entry in _entries(where) if entry.is_file())
        holds = f"holds {counted(flat, 'file')}, but no folders with images" if flat else "holds no images"
        raise ValueError(
            f"{where} {holds}: a data set is shards, or a folder with a folder of images for each class, such as "
            f"{where.rstrip('/')}/cat/1.jpg"
        )
    if labels <= _PARTS:
        shown = " or ".join(f"{where.rstrip('/')}/{label}" for label in sorted(labels))
        raise ValueError(
            f"{where} has parts of a data set in place of classes: give {shown}, or --data to `eval suite`"
        )
    return files


def _entries(where: str) -> list[os.DirEntry[str]]:
    with os.scandir(where) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _below(where: str, name: str) -> Iterator[_File]:
    """Give the files below a class folder; links are followed, but into no folder twice."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(Path(where) / name, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 - once for each of many folders
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        inner = os.path.relpath(folder, where)
        for each in names:
            if not each.startswith("."):
                path = os.path.join(folder, each)  # noqa: PTH118 - the same
                # A link to nowhere is listed too, and ends as a file that cannot be read.
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # noqa: PTH110, PTH116 - the same
                yield _File(f"{inner}/{each}", status.st_size, status.st_mtime_ns)


def _pack(where: str, files: list[_File], final: Path) -> Manifest:
    root = Path(where).absolute()
    listed = beside(final, "jsonl")
    entries = ({"path": str(root / file.path), "label": file.label} for file in files)
    write_whole(listed, "".join(json.dumps(entry) + "\n" for entry in entries), durable=False)
    try:
        with appearing(final, durable=True) as aside:
            config = PackConfig(sources=(str(listed),), out=str(aside), labels="column")
            packed = pack(config, ProgressBars(enabled=sys.stderr.isatty()))
            assert packed is not None
            manifest = packed[""]
            if manifest.num_rejected > _MAX_REJECTED * manifest.num_inputs:
                raise ValueError(
                    f"{where}: {manifest.num_rejected:,} of {manifest.num_inputs:,} files cannot be read as images "
                    f"({_tally(manifest)}): remove them, or pack what is good with `make-shards pack`"
                )
    finally:
        listed.unlink(missing_ok=True)
    return manifest


def _tally(manifest: Manifest) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejections.items())


def _line(where: str, manifest: Manifest, final: Path) -> str:
    rejected = counted(manifest.num_rejected, "file")
    left_out = f"; {rejected} left out ({_tally(manifest)})" if manifest.num_rejected else ""
    classes = counted(len(manifest.class_names), "class", plural="classes")
    counts = f"{counted(manifest.num_samples, 'image')} in {classes}"
    return f"{where}: {counts} are packed into {final}, for this and later evaluations{left_out}"
