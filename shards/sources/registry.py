"""Kinds of sources, and how the one that the user named is found."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from shards.config import SourceOptions
from shards.ground.errors import PackError
from shards.images.data_files import CONVERTED, HOLD_IMAGES
from shards.images.sniff import SNIFFED_BYTES, container, is_image
from shards.sources.base import Source
from shards.storage.file_kinds import ARCHIVES, LISTS, OTHER_ARCHIVES, kind_of_archive, may_be_archive
from shards.storage.stores import check_url, is_url, open_bytes
from shards.storage.unpacking import COMPRESSIONS, UnpackError, unpacked_head

__all__ = ["SOURCES", "nested_source", "open_source", "reopen_source"]

SOURCES: dict[str, str] = {
    "folder": "shards.sources.folder:FolderSource",
    "objects": "shards.sources.objects:ObjectsSource",
    "tar": "shards.sources.tarfiles:TarSource",
    "zip": "shards.sources.zipfiles:ZipSource",
    "table": "shards.sources.tables:TableSource",
    "tfrecord": "shards.sources.records:TFRecordSource",
    "mds": "shards.sources.records:MdsSource",
    "list": "shards.sources.lists:ListSource",
    "imagenet": "shards.sources.imagenet:ImageNetSource",
    "cifar": "shards.sources.cifar:CifarSource",
    "voc": "shards.sources.voc:VocSource",
    "coco": "shards.sources.coco:CocoSource",
    "benchmark": "shards.sources.benchmarks:BenchmarkSource",
}
"""Where the class of each kind of source is; it is imported when it is needed."""

_CONTAINERS = {
    "tar": "tar",
    "zip": "zip",
    "Parquet": "table",
    "Arrow": "table",
    "TFRecord": "tfrecord",
    "MDS": "mds",
}
"""The kind of source that reads each container of shards.images.sniff."""

_IN_COMPRESSED = ("tar", "TFRecord", "MDS")

LAYOUTS = ("imagenet", "cifar", "voc", "coco")
"""Kinds that recognize the layout of a usual data set in a path: `recognize(path, options)` gives a source, or None."""


def _class_of(name: str) -> Callable[..., Source]:
    module, _, attribute = SOURCES[name].partition(":")
    return getattr(import_module(module), attribute)


def nested_source(path: str, options: SourceOptions) -> Source | None:
    """Return the source that a file among others is: an archive or a table. None for other files.

    Its name says that it may be one, its content which; an image may be called anything.

    Raises:
        PackError: it is called one and is not, or one that cannot be read: its images would be lost.
    """
    lower, kind = path.lower(), kind_of_archive(path)
    if not may_be_archive(os.fsencode(path)):
        return None
    if kind is not None and kind not in _CONTAINERS.values():
        return _class_of(kind)(path, options)
    found = _archive_by_content(path, options)
    may_be_else = kind is None and not lower.endswith(OTHER_ARCHIVES)
    if found is None and not may_be_else and not is_image(_head(path)):
        head = _head(path)[:8]
        begins = f"begins with {head.hex(' ')}" if head else "is empty"
        raise PackError(
            f"{path} is called an archive, but {begins}, which is none that is read: its images would be lost "
            "silently. Get it again, unpack it, or move it away"
        )
    return found


def _archive_by_content(path: str, options: SourceOptions) -> Source | None:
    """Return the archive or table that a file is by its content; None for other files.

    Raises:
        PackError: it is an archive that is not read.
    """
    found = _found_container(path)
    kind = _CONTAINERS.get(found or "")
    if found in COMPRESSIONS:
        inside = _found_inside(path, found)
        kind = _CONTAINERS.get(inside) if inside in _IN_COMPRESSED else None
        found = inside if inside in HOLD_IMAGES else found
    if kind is None and found in CONVERTED:
        raise PackError(
            f"{path} is {found}, which is not read: its images would be lost silently. docs/packing.md (Other "
            "containers) has the commands that turn it into a tar: pack that, or move it away"
        )
    if kind is None and found is not None and path.lower().endswith(OTHER_ARCHIVES):
        raise PackError(
            f"{path} is {found}, which is not read: its images would be lost silently. Unpack it, write it again as "
            ".tar, .tar.zst, .zip or .parquet, or move it away"
        )
    return None if kind is None else _class_of(kind)(path, options)


def _found_container(path: str) -> str | None:
    head, called = _head(path), kind_of_archive(path)
    if called == "tar" and head == bytes(SNIFFED_BYTES):
        return "tar"  # an empty one
    file = open_bytes(path)
    if called == "zip" and container(head) is None and b"PK\5\6" in file.read(max(0, file.size - (1 << 16)), 1 << 16):
        return "zip"  # behind a program that unpacks it
    # An archive's first member does not say what the others are.
    return "zip" if called == "zip" and head.startswith(b"PK\3\4") else container(head)


def _found_inside(path: str, compression: str) -> str:
    """Return the name of what is compressed in a file; of what is cut or damaged, by its name."""
    try:
        head = unpacked_head(open_bytes(path), compression, SNIFFED_BYTES)
    except UnpackError:
        called = kind_of_archive(path.rpartition(".")[0])
        return next((name for name in _IN_COMPRESSED if _CONTAINERS[name] == called), "tar")
    return container(head) or ("" if head.strip(b"\0") else "tar")


def _head(path: str) -> bytes:
    return open_bytes(path).read(0, SNIFFED_BYTES)


def open_source(path: str, options: SourceOptions) -> Source:
    """Find the kind of a source.

    Raises:
        ValueError: there is nothing there, or nothing that can be listed; or an option means nothing for it.
    """
    if options.image_root is not None and not path.lower().endswith((*LISTS, ".json")):
        raise ValueError(
            f"--image-root {options.image_root} means nothing for {path}, which is not a list of images: leave it out, "
            "or pack this source apart"
        )
    if options.annotations:
        return _class_of("benchmark")(path, follow_links=options.follow_links)
    for kind in LAYOUTS:
        layout: Any = _class_of(kind)
        source: Source | None = layout.recognize(path, options)
        if source is not None:
            return source
    if options.subset is not None:
        raise ValueError(
            f"--subset {options.subset} means nothing for {path}, which is not in the layout of a data set with parts "
            "(docs/packing.md): leave it out"
        )
    return _open_any(path, options)


def _open_any(path: str, options: SourceOptions) -> Source:
    remote = is_url(path)
    if remote:
        check_url(path)
    elif os.path.isdir(path):  # noqa: PTH112 - the text that the user gave is kept as it is
        return _class_of("folder")(path, options)
    elif not os.path.exists(path):  # noqa: PTH110 - the same
        raise ValueError(f"{path} does not exist: give a folder, an archive, a table, a list, or the URL of one")
    kind = kind_of_archive(path)
    # What is not on this machine is first looked at when it is listed.
    nested = nested_source(path, options) if not remote else None if kind is None else _class_of(kind)(path, options)
    if nested is not None:
        return nested
    if path.lower().endswith(LISTS):
        return _class_of("list")(path, options)
    if remote and not path.startswith("http"):
        return _class_of("objects")(path, options)
    found = None if remote else _archive_by_content(path, options)
    if found is not None:
        return found
    if not remote and is_image(_head(path)):
        raise ValueError(f"{path} is an image: give the folder that holds it, or a list of images")
    raise ValueError(
        f"{path} is not a source: give a folder, or a file that ends in {' '.join(ARCHIVES)} {' '.join(LISTS[:4])}"
    )


def reopen_source(spec: dict[str, Any], folder: Path) -> Source:
    """Open a source that a plan names.

    Args:
        spec: from `Source.spec`.
        folder: the plan's folder, where spools are.
    """
    options = dict(spec)
    if "spool" in options:
        options["spool"] = folder / options["spool"]
    return _class_of(options.pop("kind"))(**options)
