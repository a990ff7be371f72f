"""Sets of shards as readers see them: the protocols, and what all kinds of sets have in common."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from threading import Event
from typing import ClassVar, Literal, Protocol

import numpy as np

from shards.ground.arrays import Indices, LabelSets, Records
from shards.ground.digests import digest
from shards.sets.manifest import Manifest
from shards.sets.record import RECORD
from shards.sets.shard_file import ShardFile
from shards.storage.file_kinds import LABEL_SETS_SUFFIX

__all__ = ["BaseSet", "CopyHolder", "RemoteSet", "SetKind", "ShardCopy", "ShardSet", "grouped"]

SetKind = Literal["local", "remote", "merged", "beton"]
"""A folder on this machine, one in a bucket or on a web server, several sets as one, a file of FFCV's."""


def grouped(numbers: Indices) -> Iterator[tuple[int, Indices]]:
    """Give each number that is there, with the places where it is; numbers rise, and so do places."""
    by_number = np.argsort(numbers, kind="stable")
    unique, begins = np.unique(numbers[by_number], return_index=True)
    yield from zip(unique.tolist(), np.split(by_number, begins[1:]) if len(unique) else (), strict=True)


class ShardSet(Protocol):
    """A finished set of shards, wherever it is.

    `shards.open` opens one, once; from there on it travels as this handle, to other processes too. The dense sample
    number counts through the shards in the manifest's order.
    """

    kind: ClassVar[SetKind]
    """What kind of set it is."""

    @property
    def where(self) -> str:
        """Path or address, for messages and commands."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What the set holds."""
        ...

    @property
    def shard_sizes(self) -> Indices:
        """(num_shards,) samples of each shard."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        ...

    @property
    def num_shards(self) -> int:
        """Shards in the set."""
        ...

    @property
    def max_bytes(self) -> int:
        """Size of the largest image in bytes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty when nothing is labeled."""
        ...

    def index(self, shard: int) -> Records:
        """Return the records of a shard, (shard_sizes[shard],) of shards.sets.record.RECORD.

        Raises:
            ValueError: the index is absent, damaged, or not that of this manifest, or the store does not answer.
        """
        ...

    @property
    def reads_ranges(self) -> bool:
        """Whether shards stay where they are, over a network: each sample and each record is a request of its own."""
        ...

    def records_of(self, samples: Indices) -> Records:
        """Return the records of samples by their dense numbers, (n,) of shards.sets.record.RECORD.

        Raises:
            ValueError: as `index`.
        """
        ...

    def label_sets(self, shard: int) -> LabelSets:
        """Return the classes of a shard's samples where labels are sets (`manifest.has_label_sets`).

        Returns:
            (shard_sizes[shard], len(class_names)): 1 for a class that a sample has, 0 for one that it has not, -1 for
            one that is not to be counted, such as VOC's difficult objects.

        Raises:
            ValueError: samples have one label, or the file is absent or damaged.
        """
        ...

    def read_beside(self, name: str) -> bytes:
        """Return a file beside the shards. Raises ValueError: this kind of set has none, or it cannot be read."""
        ...

    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard for reading by offsets. Raises FileNotFoundError."""
        ...

    def shard_name(self, shard: int) -> str:
        """Return where a shard is, for messages."""
        ...

    def part(self, shard: int) -> "tuple[ShardSet, int]":
        """Return the set that a shard comes from, and its number there: another set where several are merged."""
        ...

    def with_copies(self, copy: "Callable[[RemoteSet], ShardSet]") -> "ShardSet":
        """Return the same set with what `copy` gives in place of each part that is not on this machine."""
        ...

    def copy_of(self, shard: int) -> "ShardCopy | None":
        """Return the local copy that a shard is read from, which may have to be fetched; None: read where it is."""
        ...

    @property
    def copied_bytes(self) -> Indices:
        """(num_shards,) disk that the local copy of each shard takes; 0 where it is read where it is."""
        ...


class RemoteSet(ShardSet, Protocol):
    """A set that is not on this machine."""

    @property
    def url(self) -> str:
        """Address of the folder that holds manifest.json."""
        ...

    @property
    def digest(self) -> str:
        """xxh3_128 of the bytes that decide what the manifest is, in hex."""
        ...


class CopyHolder(Protocol):
    """Keeps local copies from being evicted."""

    @property
    def share_bytes(self) -> int:
        """What this process may hold at once."""
        ...

    @property
    def fetchers(self) -> tuple[int, int]:
        """Copies that this process fetches at once: to begin with, and at most."""
        ...

    def hold(self, names: set[str]) -> None:
        """Hold exactly these copies from now on."""
        ...

    def close(self) -> None:
        """Hold nothing any more."""
        ...


class ShardCopy(Protocol):
    """The local copy of a shard."""

    @property
    def name(self) -> str:
        """Its name among the copies."""
        ...

    @property
    def num_bytes(self) -> int:
        """Disk that it takes."""
        ...

    def fetch(self, *, cancel: Event) -> bool:
        """Fetch it, unless it is there, and return whether this did; stop soon once `cancel` is set.

        Raises ValueError or OSError.
        """
        ...

    def open_holder(self) -> CopyHolder:
        """Return a new holder of the copies of the whole set."""
        ...


class BaseSet(ABC):
    """What follows from where a set is and from its manifest: the base of the kinds here.

    Args:
        where: path or address.
        manifest: its content.
    """

    kind: ClassVar[SetKind]

    def __init__(self, where: str, manifest: Manifest) -> None:
        self.where = where
        self.manifest = manifest
        self.shard_sizes: Indices = manifest.shards.num_samples
        """(num_shards,) samples of each shard."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r}, num_samples={self.num_samples}, num_shards={self.num_shards})"

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return self.manifest.num_samples

    @property
    def num_shards(self) -> int:
        """Shards in the set."""
        return len(self.manifest.shards)

    @property
    def max_bytes(self) -> int:
        """Size of the largest image in bytes."""
        return self.manifest.max_bytes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; empty when nothing is labeled."""
        return self.manifest.class_names

    @abstractmethod
    def index(self, shard: int) -> Records:
        """Return the records of a shard."""

    @property
    def reads_ranges(self) -> bool:
        """Return False: shards are on this machine, or will be."""
        return False

    def records_of(self, samples: Indices) -> Records:
        """Return the records of samples by their dense numbers, (n,) of RECORD. Raises ValueError."""
        found = np.empty(len(samples), dtype=RECORD)
        ends = np.cumsum(self.shard_sizes)
        shard = np.searchsorted(ends, samples, side="right")
        local = samples - (ends - self.shard_sizes)[shard]
        for number, places in grouped(shard):
            found[places] = self.index(number)[local[places]]
        return found

    def label_sets(self, shard: int) -> LabelSets:
        """Return the classes of a shard's samples where labels are sets; see ShardSet."""
        entry = self.manifest.shards[shard]
        name = f"{entry.stem}{LABEL_SETS_SUFFIX}"
        if not self.manifest.has_label_sets:
            raise ValueError(f"{self.where} has one label per sample, not sets of labels")
        data = self.read_beside(name)
        if digest(data) != entry.digests.get(LABEL_SETS_SUFFIX):
            raise ValueError(
                f"{self.where}: {name} has changed since it was packed: restore it, or run `make-shards verify "
                f"{self.where}`"
            )
        return np.load(io.BytesIO(data))

    def read_beside(self, name: str) -> bytes:
        """Return a file beside the shards. Raises ValueError: this kind of set has none, or it cannot be read."""
        raise ValueError(f"{self.where} has no {name} beside its samples: use the shards that it was made of")

    @abstractmethod
    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard for reading by offsets."""

    @abstractmethod
    def shard_name(self, shard: int) -> str:
        """Return where a shard is, for messages."""

    def part(self, shard: int) -> tuple[ShardSet, int]:
        """Return this set and the number itself."""
        return self, shard

    def with_copies(self, copy: Callable[[RemoteSet], ShardSet]) -> ShardSet:
        """Return this set itself: it is on this machine."""
        del copy
        return self

    def copy_of(self, shard: int) -> ShardCopy | None:
        """Return None: shards are read where they are."""
        del shard
        return None

    @property
    def copied_bytes(self) -> Indices:
        """Return zeros: no shard is copied."""
        return np.zeros(self.num_shards, dtype=np.int64)
