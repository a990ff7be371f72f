"""Files that describe the archives and tables beside them: those of our own sets, and those that other tools write."""

import re
from collections.abc import Iterable, Iterator

from shards.storage.file_kinds import (
    ASIDE_NAME,
    FILES_NAME,
    FILES_SUFFIX,
    LABEL_SETS_SUFFIX,
    MANIFEST_NAME,
    REJECTED_NAME,
    SHARD_SUFFIXES,
    SUMMARY_NAME,
    TABLE_NAME,
    TABLE_OF_SHARDS_NAME,
    UNIFORM_NAME,
    ends_as_image,
    kind_of_archive,
    may_be_archive,
)

__all__ = ["OF_SET", "describe_sets", "may_describe"]

OF_SET = "of a set of shards"
"""What such files are counted as."""

_OF_SETS = (
    *(MANIFEST_NAME, TABLE_OF_SHARDS_NAME, REJECTED_NAME, UNIFORM_NAME),
    *(ASIDE_NAME, FILES_NAME, TABLE_NAME, SUMMARY_NAME),
)
_OWN = frozenset(name.encode() for name in _OF_SETS)
_OWN_ENDS = tuple(end.encode() for end in (*SHARD_SUFFIXES[1:], LABEL_SETS_SUFFIX, FILES_SUFFIX))
_BESIDE = {
    # mosaicml-streaming; TensorFlow Datasets; `save_to_disk` of Hugging Face's datasets.
    b".mds": (b"index.json",),
    b"tfrecord": (b"dataset_info.json", b"features.json"),
    b".arrow": (b"dataset_info.json", b"state.json"),
}
_DICTIONARY = b"dataset_dict.json"
_STATISTICS = b"_stats.json"
"""img2dataset writes this beside each tar, and a table of what was tried."""
_NAMES = _OWN.union([_DICTIONARY], *_BESIDE.values())
_ENDS = (b".tar", b".parquet", b".labels.txt", _STATISTICS, *_OWN_ENDS)
_INSIDE_NAMES = (*_BESIDE, b"tfrecord")
_INSIDE = re.compile(b"|".join(map(re.escape, _INSIDE_NAMES)))


def may_describe(name: bytes) -> bool:
    """Return whether `describe_sets` looks at a file, judged by its name alone: it leaves out nearly all images."""
    if ends_as_image(name):
        return _INSIDE.search(name) is not None
    base = name.rpartition(b"/")[2]
    return base in _NAMES or base.endswith(_ENDS) or any(each in base for each in _INSIDE_NAMES) or may_be_archive(base)


def describe_sets(names: Iterable[bytes]) -> set[bytes]:
    """Return those of some files, of one or more folders, that describe others."""
    folders: dict[bytes, set[bytes]] = {}
    for name in names:
        folder, slash, base = name.rpartition(b"/")
        folders.setdefault(folder + slash, set()).add(base)
    return {folder + base for folder, bases in folders.items() for base in _in_folder(bases)}


def _in_folder(bases: set[bytes]) -> Iterator[bytes]:
    if _DICTIONARY in bases:
        yield _DICTIONARY
    for ending, describing in _BESIDE.items():
        if not bases.isdisjoint(describing) and any(ending in base for base in bases):
            yield from bases.intersection(describing)
    if any(base.endswith(b".labels.txt") for base in bases) and any(_is_record_file(base) for base in bases):
        yield from (base for base in bases if base.endswith(b".labels.txt"))
    is_own = MANIFEST_NAME.encode() in bases
    for base in bases:
        stem = base.removesuffix(b".tar")
        if stem == base:
            continue
        if stem + _STATISTICS in bases:
            yield from bases.intersection((stem + _STATISTICS, stem + b".parquet"))
        if is_own:
            yield from bases.intersection((*_OWN, *(stem + end for end in _OWN_ENDS)))


def _is_record_file(base: bytes) -> bool:
    return b"tfrecord" in base or kind_of_archive(base.decode("utf-8", "replace")) == "tfrecord"
