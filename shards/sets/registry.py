"""Kinds of sets, and the one function that opens any of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shards.sets.base import SetKind, ShardSet
from shards.storage.file_kinds import BETON_SUFFIX, MANIFEST_NAME
from shards.storage.stores import is_url, split_sets

__all__ = ["SETS", "KindOfSet", "may_be_set", "open_set"]


class KindOfSet(NamedTuple):
    """How sets of one kind are recognized and opened."""

    matches: Callable[[str], bool]
    """Whether a path or address names such a set."""
    open: Callable[[str], ShardSet]
    """Opens it. Raises ValueError."""
    is_there: Callable[[str], bool] = lambda _: True
    """Whether something is there to be opened, as far as this machine can tell without opening it."""


def _is_several(where: str) -> bool:
    return len(split_sets(where)) > 1


def _is_beton(where: str) -> bool:
    return where.endswith(BETON_SUFFIX)


def _is_path(where: str) -> bool:
    del where
    return True


def _are_there(where: str) -> bool:
    return all(may_be_set(part) for part in split_sets(where))


def _is_file(where: str) -> bool:
    return Path(where).is_file()


def _has_manifest(where: str) -> bool:
    return (Path(where) / MANIFEST_NAME).is_file()


def _open_merged(where: str) -> ShardSet:
    from shards.sets.merged import MergedShardSet

    return MergedShardSet([open_set(part) for part in split_sets(where)])


def _open_remote(where: str) -> ShardSet:
    from shards.sets.remote import RemoteShardSet

    return RemoteShardSet.open(where)


def _open_beton(where: str) -> ShardSet:
    from shards.sets.beton import BetonSet

    return BetonSet.open(where)


def _open_local(where: str) -> ShardSet:
    from shards.sets.local import LocalShardSet

    return LocalShardSet.open(where)


SETS: dict[SetKind, KindOfSet] = {
    "merged": KindOfSet(_is_several, _open_merged, _are_there),
    "remote": KindOfSet(is_url, _open_remote),
    "beton": KindOfSet(_is_beton, _open_beton, _is_file),
    "local": KindOfSet(_is_path, _open_local, _has_manifest),
}
"""The kinds of sets; the first one that matches opens a set."""


def open_set(where: str | Path) -> ShardSet:
    """Open a finished set of shards.

        import shards

        packed = shards.open("packed")
        for shard in range(packed.num_shards):
            print(packed.shard_name(shard), packed.index(shard)["label"])

    Args:
        where: a folder that `make-shards` wrote (the one that holds manifest.json), its address in a bucket or on a
            web server (s3, gs, az, http), or a `.beton`; several with commas between them are one set.

    Raises:
        ValueError: there is no such folder or file, packing has not finished there, or its format is of another
            version; or the store does not answer.
    """
    where = str(where)
    return _kind_of(where).open(where)


def may_be_set(where: str) -> bool:
    """Return whether `open_set` may find a set there: at an address always, on this machine where there is one."""
    return _kind_of(where).is_there(where)


def _kind_of(where: str) -> KindOfSet:
    return next(kind for kind in SETS.values() if kind.matches(where))
