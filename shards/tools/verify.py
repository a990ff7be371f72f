"""Command `verify`: every byte of a set, compared with what its manifest and indexes promise."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.config import WORK_FOLDER
from shards.ground.digests import crc32c, digest, digest_file
from shards.ground.errors import PackError, Rejected
from shards.ground.pool import run_tasks
from shards.ground.progress import ProgressBars, Tick
from shards.images.isolation import Limits, run_codecs
from shards.images.jpeg import JpegError, is_jpeg, parse_jpeg
from shards.images.libraries import decode_jpeg
from shards.sets.local import LocalShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest, ShardEntry
from shards.sets.record import ANNOTATED, INDEXED, Flag
from shards.sets.shard_folder import ShardFolder
from shards.storage.file_kinds import FILES_FOLDER, FILES_NAME, FILES_SUFFIX, TABLE_OF_SHARDS_NAME
from shards.storage.tar import BLOCK, EndOfTar, TarError, parse_header

__all__ = ["Problem", "check_image", "verify"]


_KEPT_AS_IT_WAS = Flag.NOT_JPEG | Flag.NOT_RGB | Flag.DAMAGED
"""What of a benchmark was packed although not every decoder reads it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One difference from what the manifest and the indexes promise."""

    shard: str
    sample: str | None
    """Key of the sample; None where the whole shard is concerned."""
    what: str

    def __str__(self) -> str:
        where = f"{self.shard}, sample {self.sample}" if self.sample else self.shard
        return f"{where}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class _CheckShard:
    """The job of checking one shard, for a worker process."""

    folder: ShardFolder
    manifest: Manifest
    decode: bool

    def __call__(self, number: int, tick: Tick) -> list[Problem]:
        entry = self.manifest.shards[number]
        names = [entry.name, *(f"{entry.stem}{suffix}" for suffix in {**entry.digests, ".index.npy": ""})]
        with self.folder.opened(dict.fromkeys(names), self.manifest) as shards:
            problems = verify_shard(shards, number, decode=self.decode)
        tick(entry.num_samples, entry.num_bytes)
        return problems


def verify(
    path: str | Path,
    *,
    decode: bool = False,
    workers: int = 1,
    work_folder: str = WORK_FOLDER,
    progress: ProgressBars | None = None,
) -> list[Problem]:
    """Check digests, tar structure, offsets, labels, checksums and image headers of a set.

        import shards

        for problem in shards.verify("packed", decode=True):
            print(problem)

    Args:
        path: folder with manifest.json, local or in a bucket.
        decode: also decode every pixel.
        workers: processes; the report is the same for any number.
        work_folder: local folder for the shards of a bucket, one for each worker at a time.
        progress: draws a bar.

    Returns:
        What is wrong, in the order of the shards; empty for a sound set.

    Raises:
        ValueError: there is no finished set.
        PackError: the bucket does not answer, or a worker died.
    """
    folder = ShardFolder(where=str(path), work_folder=work_folder)
    manifest, about_table = folder.compared_manifest()
    check, numbers = _CheckShard(folder=folder, manifest=manifest, decode=decode), range(len(manifest.shards))
    with (progress or ProgressBars(enabled=False)).stage(
        "verifying", unit=" images", total=manifest.num_samples
    ) as tick:
        found = dict(run_tasks(check, numbers, workers=workers, tick=tick))
    problems = [Problem(shard=TABLE_OF_SHARDS_NAME, sample=None, what=about_table)] if about_table else []
    problems += [Problem(shard=MANIFEST_NAME, sample=None, what=what) for what in _check_totals(manifest)]
    problems += [problem for number in numbers for problem in found[number]]
    return [*problems, *_check_files(folder)] if manifest.settings.get(ANNOTATED) else problems


def _check_totals(manifest: Manifest) -> Iterator[str]:
    """Compare what the manifest says of all shards with what it says of each."""
    most = dict.fromkeys(("max_width", "max_height", "max_bytes"), 0)
    for entry in manifest.shards:
        most = {name: max(value, getattr(entry, name)) for name, value in most.items()}
    for name, value in most.items():
        if getattr(manifest, name) != value:
            yield f"has changed since it was packed: {name} is {getattr(manifest, name)}, but {value} in its shards"


def verify_shard(shards: LocalShardSet, number: int, *, decode: bool) -> list[Problem]:
    """Check one shard."""
    entry = shards.manifest.shards[number]
    problems = [Problem(shard=entry.name, sample=None, what=what) for what in _check_digests(shards.path, entry)]
    try:
        records = shards.index(number)
    except ValueError as error:
        return [*problems, Problem(shard=entry.name, sample=None, what=str(error))]
    num_classes, label = len(shards.manifest.class_names), int(records["label"].max(initial=-1))
    if label >= num_classes:
        what = f"has the label {label}, but {MANIFEST_NAME} names {num_classes} classes: class_names was changed"
        problems.append(Problem(shard=entry.name, sample=None, what=what))
    settings = shards.manifest.settings
    # Tars that others wrote have other names and members.
    check = _check_images_only if settings.get(INDEXED) else _check_samples
    if settings.get(ANNOTATED):
        check = partial(_check_members, table=shards.path / f"{entry.stem}{FILES_SUFFIX}")
    try:
        with shards.shard_path(number).open("rb") as file:
            problems += [
                Problem(shard=entry.name, sample=key, what=what)
                for key, what in check(file, entry, records, decode=decode)
            ]
    except OSError as error:
        problems.append(Problem(shard=entry.name, sample=None, what=f"cannot be read: {error.strerror}"))
    return problems


def _check_digests(folder: Path, entry: ShardEntry) -> Iterator[str]:
    for suffix, promised in entry.digests.items():
        try:
            found = digest_file(folder / f"{entry.stem}{suffix}")
        except OSError as error:
            yield f"{entry.stem}{suffix} cannot be read: {error.strerror}"
            continue
        if found != promised:
            yield f"{entry.stem}{suffix} has changed since it was packed: digest {found}, not {promised}"


def _check_samples(
    file: io.BufferedReader, entry: ShardEntry, records: NDArray[np.void], *, decode: bool
) -> Iterator[tuple[str | None, str]]:
    """Walk the tar from member to member and compare it with the index; yields (key, what is wrong)."""
    at = 0
    for record in records:
        key = f"{int(record['position']):012d}"
        try:
            name, data, start = _member(file, at)
        except (TarError, EndOfTar) as error:
            yield key, f"the tar ends or breaks at byte {at}: {error or 'end of archive'}"
            return
        if name != f"{key}.jpg" or start != record["offset"] or len(data) != record["size"]:
            yield (
                key,
                f"the tar has {name} of {len(data)} bytes at {start}, the index {record['size']} at {record['offset']}",
            )
            return
        at = start + len(data) + -len(data) % BLOCK
        yield from ((key, what) for what in check_image(data, record, decode=decode))
        if record["label"] >= 0:
            try:
                name, data, start = _member(file, at)
            except (TarError, EndOfTar) as error:
                yield key, f"its label is missing: {error or 'end of archive'}"
                return
            if name != f"{key}.cls" or data != b"%d" % record["label"]:
                yield key, f"its label is {name} with {data[:20]!r}, the index says {record['label']}"
            at = start + len(data) + -len(data) % BLOCK
    yield from _check_end(file, at, entry)


def _check_end(file: io.BufferedReader, at: int, entry: ShardEntry) -> Iterator[tuple[None, str]]:
    file.seek(at)
    if file.read() != bytes(2 * BLOCK):
        yield None, f"does not end with two empty blocks at byte {at}"
    if os.fstat(file.fileno()).st_size != entry.num_bytes:
        yield None, f"has {os.fstat(file.fileno()).st_size} bytes, not {entry.num_bytes}"


def _check_members(
    file: io.BufferedReader, entry: ShardEntry, records: NDArray[np.void], *, decode: bool, table: Path
) -> Iterator[tuple[str | None, str]]:
    """Compare each of a benchmark's files with their table, and images with the index; yields (path, what is wrong)."""
    at = 0
    try:
        lines = [json.loads(line) for line in table.read_bytes().splitlines()]
        for told in lines:
            name, data, start = _member(file, at)
            if (start, len(data)) != (told["offset"], told["size"]):
                yield told["path"], f"the tar has {name} of {len(data)} bytes at {start}, the table another place"
                return
            if crc32c(data) != told["crc32c"]:
                yield told["path"], "its bytes have changed since it was packed: crc32c differs"
            at = start + len(data) + -len(data) % BLOCK
    except (OSError, ValueError, KeyError, EndOfTar) as error:
        yield None, f"the tar or {table.name} ends or breaks, at byte {at} of the tar: {error or 'end of archive'}"
        return
    yield from _check_end(file, at, entry)
    yield from _check_images_only(file, entry, records, decode=decode, not_decoded=_KEPT_AS_IT_WAS)


def _check_files(folder: ShardFolder) -> Iterator[Problem]:
    """Compare the files beside a benchmark's shards with their list."""
    where = FILES_NAME
    try:
        for told in map(json.loads, _read(folder, FILES_NAME).splitlines()):
            where = f"{FILES_FOLDER}/{told['path']}"
            if digest(_read(folder, where)) != told["xxh3_128"]:
                yield Problem(shard=where, sample=None, what="has changed since it was packed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Problem(shard=where, sample=None, what=f"cannot be read, or {FILES_NAME} has changed: {error}")


def _read(folder: ShardFolder, name: str) -> bytes:
    file = folder.open(name)
    return file.read(0, file.size)


def _check_images_only(
    file: io.BufferedReader,
    entry: ShardEntry,
    records: NDArray[np.void],
    *,
    decode: bool,
    not_decoded: Flag = Flag.NOT_JPEG,
) -> Iterator[tuple[str | None, str]]:
    """Compare each image with the index; yields (number of the sample, what is wrong)."""
    del entry
    for record in records:
        file.seek(int(record["offset"]))
        data = file.read(int(record["size"]))
        for what in check_image(data, record, decode=decode and not record["flags"] & not_decoded):
            yield str(record["position"]), what


def _member(file: io.BufferedReader, at: int) -> tuple[str, bytes, int]:
    """Return (name, data, offset of the data) of the member at a byte."""
    file.seek(at)
    member = parse_header(file.read(BLOCK))
    data = file.read(member.size)
    if len(data) != member.size:
        raise TarError(f"cut after {len(data)} of {member.size} bytes")
    return os.fsdecode(member.name), data, at + BLOCK


def check_image(data: bytes, record: Any, *, decode: bool) -> Iterator[str]:
    """Compare the bytes of an image with its index record; yields what is wrong."""
    if crc32c(data) != record["crc32c"]:
        yield "its bytes have changed since it was packed: crc32c differs"
        return
    if not is_jpeg(data):
        if not record["flags"] & Flag.NOT_JPEG:
            yield "is not a JPEG"
        return
    try:
        header = parse_jpeg(data)
    except JpegError as error:
        if not record["flags"] & Flag.DAMAGED:
            yield f"is a JPEG that {error}"
        return
    if (header.width, header.height) != (record["width"], record["height"]):
        yield f"is {header.width} x {header.height} pixels, the index says {record['width']} x {record['height']}"
    if not header.is_baseline and not record["flags"] & Flag.NOT_BASELINE:
        yield "is not a baseline JPEG"
    if decode:
        try:
            run_codecs(_decode, Limits.of(header.width * header.height), data, header.num_components == 1)
        except PackError:
            raise
        except (ValueError, Rejected) as error:
            yield f"does not decode: {error.detail if isinstance(error, Rejected) else error}"


def _decode(data: bytes, gray: bool) -> None:
    decode_jpeg(data, gray=gray)
