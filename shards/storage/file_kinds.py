"""File kinds by the ending of their names: what `make-shards` reads, and what it writes beside a shard."""

__all__ = [
    "ARCHIVES",
    "BETON_SUFFIX",
    "IMAGE_SUFFIXES",
    "LABEL_SETS_SUFFIX",
    "LISTS",
    "MANIFEST_NAME",
    "SHARD_SUFFIXES",
    "kind_of_archive",
]

ARCHIVES = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
    ".zip": "zip",
    ".parquet": "table",
    ".arrow": "table",
}
"""Files that hold images: the kind of source that reads them (shards.sources.registry)."""

LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".txt.gz", ".csv.gz", ".tsv.gz", ".jsonl.gz")
"""Files that name images."""

_IMAGES = "avif avifs bmp dib gif icns ico j2c j2k jp2 jpc jpe jpeg jpf jpg jpx pcx pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGES.split(" "))
"""Members of a WebDataset sample that are images."""

SHARD_SUFFIXES = (".tar", ".index.npy", ".sources.txt", ".idx")
"""The files of a shard, each after its stem."""

LABEL_SETS_SUFFIX = ".labels.npy"
"""The file of a shard whose samples have sets of classes: (N, C) int8, 1 in the set, 0 not, -1 not to be counted."""

MANIFEST_NAME = "manifest.json"
"""The file that makes a folder of shards a set."""

BETON_SUFFIX = ".beton"
"""FFCV's file format."""


def kind_of_archive(name: str) -> str | None:
    """Return the kind of source that reads a file of this name as an archive or a table; None for other files."""
    lower = name.lower()
    return next((kind for suffix, kind in ARCHIVES.items() if lower.endswith(suffix)), None)
