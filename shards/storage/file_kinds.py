"""File kinds by their names: what `make-shards` reads, what it writes beside a shard, and what systems leave behind."""

import os
import re
from functools import lru_cache

__all__ = [
    "ARCHIVES",
    "ASIDE_NAME",
    "BETON_SUFFIX",
    "COMPRESSED",
    "FILES_FOLDER",
    "FILES_NAME",
    "FILES_SUFFIX",
    "IMAGE_SUFFIXES",
    "LABEL_SETS_SUFFIX",
    "LISTS",
    "MANIFEST_NAME",
    "OTHER_ARCHIVES",
    "REJECTED_NAME",
    "SHARD_SUFFIXES",
    "SUMMARY_NAME",
    "TABLE_NAME",
    "TABLE_OF_SHARDS_NAME",
    "UNIFORM_NAME",
    "ends_as_image",
    "key_of_plain_image",
    "kind_of_archive",
    "litter",
    "may_be_archive",
    "stem_of_archive",
]

ARCHIVES = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tbz2": "tar",
    ".tar.xz": "tar",
    ".txz": "tar",
    ".tar.zst": "tar",
    ".tzst": "tar",
    ".zip": "zip",
    ".parquet": "table",
    ".arrow": "table",
    ".feather": "table",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".mds": "mds",
}
"""Files that hold images: the kind of source that reads them (shards.sources.registry)."""

OTHER_ARCHIVES = (
    *(".7z", ".rar", ".cpio", ".tar.lz4", ".tar.lz", ".tar.lzma", ".tar.z"),
    *(".mds.br", ".mds.snappy", ".lmdb", ".mdb", ".rec", ".npz", ".h5", ".hdf5", ".beton"),
)
"""Files that may hold images and are not read: to pass over them would lose those."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
"""Files that may be a tar or records inside."""

# TensorFlow's programs end names of TFRecord files so; LitData's chunks; MNIST.
_RECORDS = re.compile(rb"-\d{5}-of-\d{5}\Z")
_DATA = re.compile(rb"chunk-\d+-\d+\.bin|.*-idx\d-ubyte", re.DOTALL)

LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".txt.gz", ".csv.gz", ".tsv.gz", ".jsonl.gz")
"""Files that name images."""

# heic and jxl: without the extra that reads them, rejected with a reason, but images.
_IMAGES = (
    "avif avifs bmp dib gif heic heif icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl pcx pgm png pnm ppm tga "
    "tif tiff webp"
)
IMAGE_SUFFIXES = frozenset(_IMAGES.split(" "))
"""Endings of images. Content decides what is one; what only has such a name is a damaged one, not something else."""

_IMAGE_ENDS = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
# Neither the folders nor the names of litter, no archive, and one dot: what nearly all images of large sets are.
_PLAIN_IMAGE = re.compile(
    rb"((?:[A-Z0-9][\w-]*/)*[A-Z0-9][\w-]*)\.(?:%b)" % "|".join(IMAGE_SUFFIXES).encode(), re.IGNORECASE
)

SHARD_SUFFIXES = (".tar", ".index.npy", ".sources.txt", ".idx")
"""The files of a shard, each after its stem."""

LABEL_SETS_SUFFIX = ".labels.npy"
"""The file of a shard whose samples have sets of classes: (N, C) int8, 1 in the set, 0 not, -1 not to be counted."""

FILES_SUFFIX = ".files.jsonl"
"""The file of a shard of a benchmark: which of the benchmark's files is where in the tar."""

FILES_NAME = "files.jsonl"
"""The file of a set that lists the benchmark's files that belong to many images."""

FILES_FOLDER = "files"
"""The folder of a set that holds these, each under its path in the benchmark."""

MANIFEST_NAME = "manifest.json"
"""The file that makes a folder of shards a set."""

TABLE_OF_SHARDS_NAME = "manifest.npz"
"""The file that has the manifest's shards in columns, where they are many (shards.sets.shard_table)."""

REJECTED_NAME = "rejected.jsonl"
"""The file of a set that lists its rejected inputs."""

UNIFORM_NAME = "near-uniform.jsonl"
"""The file of a set that lists samples which are nearly one color."""

ASIDE_NAME = "left-aside.jsonl"
"""The file of a set that lists what of its sources was left aside."""

TABLE_NAME = "samples.parquet"
"""The file that `make-shards table` writes into a set's folder."""

SUMMARY_NAME = "summary.html"
"""The file that `make-shards summary` writes into a set's folder."""

BETON_SUFFIX = ".beton"
"""FFCV's file format."""


_LITTER_FILES = re.compile(
    rb"\._.*|\.DS_Store|\.localized|Icon\r|\.apdisk|\.VolumeIcon\.icns|(?:eh)?thumbs\.db|desktop\.ini|\.directory|"
    rb"\.?picasa\.ini|\.nomedia|\.BridgeSort|\.bridgecache.*|\.nfs[0-9a-f]+|\.fuse_hidden.*",
    re.IGNORECASE | re.DOTALL,
)
_LITTER_BEGINS = frozenset((b".", *(bytes([letter]) for letter in b"DdEeIiPpTt")))
_LITTER_FOLDERS = frozenset(
    b"__MACOSX .AppleDouble .Spotlight-V100 .Trashes .fseventsd .TemporaryItems .DocumentRevisions-V100 @eaDir "
    b"#recycle $RECYCLE.BIN .ipynb_checkpoints .thumbnails lost+found".split(b" ")
) | {b"System Volume Information"}


def litter(name: bytes, *, is_image: bool = False) -> str | None:
    """Return what a file is by its name that systems and tools leave beside images; None for others.

    Args:
        name: with its folders.
        is_image: by its content; then only the folders count, which systems keep thumbnails in.
    """
    *folders, base = name.split(b"/")
    if not _LITTER_FOLDERS.isdisjoint(folders):
        folder = next(each for each in folders if each in _LITTER_FOLDERS)
        return f"litter ({folder.decode('ascii')})"
    if is_image or base[:1] not in _LITTER_BEGINS or _LITTER_FILES.fullmatch(base) is None:
        return None
    return "litter (._*)" if base.startswith(b"._") else f"litter ({base.decode('ascii', 'replace').strip()})"


def key_of_plain_image(name: bytes) -> bytes | None:
    """Return folders and key of an image's usual name, which other rules say nothing else of; None for others.

    It is for speed: a bucket may hold a billion of them.
    """
    found = _PLAIN_IMAGE.fullmatch(name)
    return found and found[1]


def ends_as_image(name: bytes) -> bool:
    """Return whether a name ends as an image's: then it is called no archive."""
    return name.rpartition(b".")[2].lower() in _IMAGE_ENDS


def may_be_archive(name: bytes) -> bool:
    """Return whether a file is called an archive, a table, or something compressed."""
    # First, since a bucket may hold a billion images.
    return not ends_as_image(name) and _may_be_archive(name)


@lru_cache(maxsize=64)  # each name is asked for twice, one time after the other
def _may_be_archive(name: bytes) -> bool:
    if name.lower().endswith(_as_bytes((*ARCHIVES, *OTHER_ARCHIVES, *COMPRESSED))):
        return True
    return _RECORDS.search(name) is not None or _DATA.fullmatch(name.rpartition(b"/")[2]) is not None


@lru_cache(maxsize=8)
def _as_bytes(suffixes: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(suffix.encode() for suffix in suffixes)


def kind_of_archive(name: str) -> str | None:
    """Return the kind of source that reads a file of this name as an archive or a table; None for other files."""
    lower = name.lower()
    if _RECORDS.search(os.fsencode(name)):
        return "tfrecord"
    return next((kind for suffix, kind in ARCHIVES.items() if lower.endswith(suffix)), None)


def stem_of_archive(path: str) -> str:
    """Return the name of a tar or a zip without folders and ending; nothing for other files."""
    base = path.rstrip("/").rpartition("/")[2]
    endings = [suffix for suffix, kind in ARCHIVES.items() if kind in ("tar", "zip") and base.lower().endswith(suffix)]
    return base[: -max(map(len, endings))] if endings else ""
