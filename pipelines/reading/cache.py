"""Disk cache for remote shards, shared by all processes of a machine.

    FOLDER/room.lock                     held to make room, and to change what is held
    FOLDER/<digest of a manifest>/       shard-000000.tar and .index.npy, whole or not there; used last: mtime
                                         shard-000000.tar.part while it is fetched, locked by who fetches it
    FOLDER/<process>.<random>.held       what a process needs now or soon, locked by it

All locks are flocks: the kernel releases them when their owner ends, however it ends. So nothing is stale after a kill:
a `.part` or `.held` that no process locks belongs to none.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.ground.arrays import Indices, Records
from shards.ground.digests import running_digest
from shards.ground.errors import ExpiredError, PackError, UnrenewedError
from shards.ground.locks import locked, open_locked, remove_unlocked
from shards.ground.units import gib
from shards.sets.base import BaseSet
from shards.sets.manifest import Manifest, ShardEntry
from shards.sets.record import RECORD, index_bytes, npy_header
from shards.sets.remote import RemoteShardSet
from shards.sets.shard_file import LocalShardFile, ShardFile
from shards.storage.stores import open_folder

__all__ = ["CacheFolder", "CacheFullError", "CachedShard", "CachedShardSet", "FetchError", "Holder"]

_LOG = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 20
_ATTEMPTS = 3
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 30.0
_OUTAGE_S = 300.0
_WAIT_FOR_ROOM_S = 20.0


class FetchError(ValueError):
    """A shard cannot be fetched."""


class CacheFullError(ValueError):
    """All that is in the cache is in use."""


@dataclass(frozen=True, kw_only=True)
class CacheFolder:
    """Where copies are kept, and how many."""

    path: Path
    budget_bytes: int
    share_bytes: int
    """What one rank holds for now and later."""
    fetchers: tuple[int, int] = (4, 32)
    """Shards that a rank fetches at once: to begin with, and at most."""

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep others from changing what is held, and from making room."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "room.lock", holder=str(self.path), wait=True):
            yield

    def make_room(self, descriptor: int, num_bytes: int, shard: str) -> None:
        """Reserve bytes for a file that is open, and evict what was used least recently until there is room.

        Raises:
            CacheFullError: what is left is held.
        """
        with self.locked():
            held = self._held()
            files = self._files()
            used = sum(status.st_size for status in files.values())
            tars = sorted((status.st_mtime, path) for path, status in files.items() if path.suffix == ".tar")
            for _, tar in tars:
                if used + num_bytes <= self.budget_bytes:
                    break
                if self.name_of(tar) not in held:
                    used -= sum(files[path].st_size for path in (tar, _index_of(tar)) if path in files)
                    tar.unlink(missing_ok=True)
                    _index_of(tar).unlink(missing_ok=True)
            if used + num_bytes > self.budget_bytes:
                raise CacheFullError(
                    f"no room for {shard} ({gib(num_bytes)}): {self.path} may hold {gib(self.budget_bytes)}, and "
                    f"{gib(used)} are in use; raise --data.cache-gib, or give other runs a --data.cache of their own"
                )
            os.ftruncate(descriptor, num_bytes)

    def sweep(self) -> None:
        """Remove what processes that were killed left half done."""
        with self.locked():
            for path in [*self.path.glob("*/*.part"), *self.path.glob("*.held")]:
                remove_unlocked(path)

    def name_of(self, tar: Path) -> str:
        """Name of a shard in this folder."""
        return f"{tar.parent.name}/{tar.name}"

    def _held(self) -> set[str]:
        names: set[str] = set()
        for path in self.path.glob("*.held"):
            if not remove_unlocked(path):
                names.update(path.read_text().splitlines())
        return names

    def _files(self) -> dict[Path, os.stat_result]:
        found: dict[Path, os.stat_result] = {}
        for path in self.path.glob("*/*"):
            with suppress(FileNotFoundError):
                found[path] = path.stat()
        return found


class Holder:
    """What this process needs now or soon, which no process evicts. Safe for several threads."""

    def __init__(self, folder: CacheFolder) -> None:
        self.share_bytes = folder.share_bytes
        """What this process may hold at once."""
        self.fetchers = folder.fetchers
        self._folder = folder
        folder.sweep()
        self._path = folder.path / f"{os.getpid()}.{uuid.uuid4().hex}.held"
        self._descriptor = open_locked(self._path, holder=str(self._path), wait=True)

    def hold(self, names: set[str]) -> None:
        """Hold exactly these shards from now on."""
        with self._folder.locked():
            text = "".join(f"{name}\n" for name in sorted(names)).encode()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text, 0)

    def close(self) -> None:
        """Hold nothing any more."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


@dataclass(frozen=True)
class CachedShard:
    """The local copy of a shard; see shards.sets.base.ShardCopy."""

    shards: "CachedShardSet"
    shard: int

    @property
    def name(self) -> str:
        """Name in the cache's folder."""
        return self.shards.cached_name(self.shard)

    @property
    def num_bytes(self) -> int:
        """Disk that it takes in the cache."""
        return int(self.shards.copied_bytes[self.shard])

    def fetch(self, *, cancel: threading.Event) -> bool:
        """Fetch it, unless it is there, and return whether this did. Raises as CachedShardSet.fetch."""
        return self.shards.fetch(self.shard, cancel=cancel)

    def open_holder(self) -> Holder:
        """Return a new holder of shards in the cache's folder."""
        return Holder(self.shards.folder)


class CachedShardSet(RemoteShardSet):
    """A remote set whose shards are fetched whole, when they are needed or before, into a folder on local disk."""

    def __init__(self, url: str, manifest: Manifest, digest: str, folder: CacheFolder) -> None:
        super().__init__(url, manifest, digest)
        self.folder = folder
        self._copied_bytes = manifest.shards.num_bytes + index_bytes(self.shard_sizes)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (CachedShardSet, (self.url, self.manifest, self.digest, self.folder))

    @property
    def reads_ranges(self) -> bool:
        """Return False: shards are copied."""
        return False

    def records_of(self, samples: Indices) -> Records:
        """Return the records of samples from the local copies of their shards' indexes. Raises ValueError."""
        return BaseSet.records_of(self, samples)

    def copy_of(self, shard: int) -> CachedShard:
        """Return the copy of a shard in the cache."""
        return CachedShard(self, shard)

    @property
    def copied_bytes(self) -> Indices:
        """(num_shards,) disk that each shard takes in the cache: the tar and its index."""
        return self._copied_bytes

    def cached_name(self, shard: int) -> str:
        """Name of a shard in the cache's folder."""
        return self.folder.name_of(self._copy(shard))

    def open_shard(self, shard: int) -> ShardFile:
        """Open the local copy of a shard's tar, fetched first if need be. Raises as `fetch`."""
        while True:
            self.fetch(shard)
            # Another process may have evicted it since, where no one holds it.
            with suppress(FileNotFoundError):
                return LocalShardFile(self._copy(shard))

    def index(self, shard: int) -> npt.NDArray[np.void]:
        """Records of a shard from the local copy of its index, fetched with the shard if need be. Raises ValueError."""
        header = npy_header(int(self.shard_sizes[shard]))
        while True:
            self.fetch(shard)
            with suppress(FileNotFoundError):
                return np.frombuffer(_index_of(self._copy(shard)).read_bytes(), dtype=RECORD, offset=len(header))

    def fetch(self, shard: int, *, cancel: threading.Event | None = None) -> bool:
        """Make sure that a shard is on this machine; others that want it at the same time wait for the same copy.

        Returns whether it had to be fetched, and was.

        Args:
            shard: its number.
            cancel: gives up between two pieces once this is set.

        Raises:
            FetchError: the store does not give it, or gives something else than what was packed.
            CacheFullError: there is no room, and none is made while we wait.
        """
        copy = self._copy(shard)
        if _touch(copy):
            return False
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(copy) as (part, descriptor):
            # The process that held the lock before us may have wanted the same.
            if _touch(copy) or not self._download(shard, descriptor, cancel or threading.Event()):
                return False
            part.replace(copy)
            return True

    def _copy(self, shard: int) -> Path:
        return self.folder.path / self.digest / self.manifest.shards.name(shard)

    def _download(self, shard: int, descriptor: int, cancel: threading.Event) -> bool:
        """Write a tar to its part and its index beside it, once more after an outage; False when canceled."""
        entry, name = self.manifest.shards[shard], self.shard_name(shard)
        outage_ends, delay_s, num_wrong = time.monotonic() + _OUTAGE_S, _BACK_OFF_S, 0
        while True:
            self._reserve(descriptor, int(self._copied_bytes[shard]), name, cancel)
            try:
                problem = self._copy_pieces(entry, descriptor, cancel)
                if not problem and not cancel.is_set():
                    self._copy_index(shard)
            except PackError as error:
                if _is_refusal(error) or time.monotonic() > outage_ends:
                    raise
                problem = str(error)
            else:
                if cancel.is_set() or not problem:
                    return not cancel.is_set()
                num_wrong += 1
                if num_wrong == _ATTEMPTS:
                    raise FetchError(f"{problem}, {_ATTEMPTS} times; `make-shards verify {self.url}` says more")
            _LOG.warning("%s (trying again in %.3g s)", problem, delay_s)
            if cancel.wait(delay_s):
                return False
            delay_s = min(2 * delay_s, _LONGEST_BACK_OFF_S)

    def _copy_index(self, shard: int) -> None:
        copy = _index_of(self._copy(shard))
        with _part_of(copy) as (part, descriptor):
            os.pwrite(descriptor, self.index_bytes(shard), 0)
            part.replace(copy)

    def _reserve(self, descriptor: int, num_bytes: int, name: str, cancel: threading.Event) -> None:
        deadline = time.monotonic() + _WAIT_FOR_ROOM_S
        os.ftruncate(descriptor, 0)
        while True:
            try:
                return self.folder.make_room(descriptor, num_bytes, name)
            except CacheFullError:
                if time.monotonic() > deadline or cancel.wait(0.2):
                    raise

    def _copy_pieces(self, entry: ShardEntry, descriptor: int, cancel: threading.Event) -> str:
        """Fetch a tar piece by piece; give what is wrong with it, if anything."""
        name, store, digest = f"{self.url}/{entry.name}", open_folder(self.url), running_digest()
        try:
            size = store.size(entry.name)
            if size != entry.num_bytes:
                return f"{name} has {size} bytes, and manifest.json says {entry.num_bytes}"
            for begin in range(0, size, _PIECE_BYTES):
                at = begin
                # In chunks: whole pieces would be memory that is new for each of them, and copied twice.
                for chunk in store.stream(entry.name, begin, min(_PIECE_BYTES, size - begin)):
                    if cancel.is_set():
                        return ""
                    digest.update(chunk)
                    os.pwrite(descriptor, chunk, at)
                    at += len(chunk)
        except FileNotFoundError:
            raise FetchError(
                f"{name} is listed in manifest.json but absent: restore it, or run `make-shards verify {self.url}`"
            ) from None
        except OSError as error:
            raise FetchError(
                f"cannot keep {name} in {self.folder.path} ({error.strerror}): make room there, or name another folder "
                "with --data.cache"
            ) from None
        os.ftruncate(descriptor, size)
        # After a power cut, a name must not stand for bytes that never reached the disk.
        os.fsync(descriptor)
        found = digest.hexdigest()
        promised = entry.digests.get(".tar", found)
        return "" if found == promised else f"{name} arrived with digest {found}, and manifest.json says {promised}"


@contextmanager
def _part_of(copy: Path) -> Generator[tuple[Path, int]]:
    """(path, descriptor) of the locked file that a copy grows in; removed unless it was renamed meanwhile."""
    part = copy.with_name(f"{copy.name}.part")
    descriptor = open_locked(part, holder=str(part), wait=True)
    try:
        yield part, descriptor
    finally:
        # Renamed, its name may be another's file already.
        with suppress(FileNotFoundError):
            if part.stat().st_ino == os.fstat(descriptor).st_ino:
                part.unlink()
        os.close(descriptor)


def _touch(copy: Path) -> bool:
    """Note that a copy is used, if it is there."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


def _is_refusal(error: PackError) -> bool:
    """Whether asking again is of no use."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    if isinstance(error, UnrenewedError):
        return False
    is_refused = isinstance(error.__context__, PermissionDeniedError | UnauthenticatedError)
    return is_refused or isinstance(error, ExpiredError)


def _index_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}.index.npy")
