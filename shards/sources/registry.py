"""Kinds of sources, and how the one that the user named is found."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from shards.config import Columns, SourceOptions
from shards.sources.base import Source
from shards.storage.file_kinds import ARCHIVES, LISTS, kind_of_archive
from shards.storage.stores import check_url, is_url

__all__ = ["SOURCES", "nested_source", "open_source", "reopen_source"]

SOURCES: dict[str, str] = {
    "folder": "shards.sources.folder:FolderSource",
    "objects": "shards.sources.objects:ObjectsSource",
    "tar": "shards.sources.tarfiles:TarSource",
    "zip": "shards.sources.zipfiles:ZipSource",
    "table": "shards.sources.tables:TableSource",
    "list": "shards.sources.lists:ListSource",
    "imagenet": "shards.sources.imagenet:ImageNetSource",
    "cifar": "shards.sources.cifar:CifarSource",
    "voc": "shards.sources.voc:VocSource",
    "coco": "shards.sources.coco:CocoSource",
}
"""Where the class of each kind of source is; it is imported when it is needed."""

LAYOUTS = ("imagenet", "cifar", "voc", "coco")
"""Kinds that recognize the layout of a usual data set in a path: `recognize(path, options)` gives a source, or None."""


def _class_of(name: str) -> Callable[..., Source]:
    module, _, attribute = SOURCES[name].partition(":")
    return getattr(import_module(module), attribute)


def nested_source(path: str, columns: Columns) -> Source | None:
    """Return the source that a file inside a folder is, by its name: an archive or a table; None for other files."""
    kind = kind_of_archive(path)
    if kind is None:
        return None
    return _class_of(kind)(path, **({"columns": columns} if kind == "table" else {}))


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
    remote, columns = is_url(path), options.columns
    if remote:
        check_url(path)
    elif os.path.isdir(path):  # noqa: PTH112 - the text that the user gave is kept as it is
        return _class_of("folder")(path, columns=columns)
    elif not os.path.exists(path):  # noqa: PTH110 - the same
        raise ValueError(f"{path} does not exist: give a folder, an archive, a table, a list, or the URL of one")
    nested = nested_source(path, columns)
    if nested is not None:
        return nested
    if path.lower().endswith(LISTS):
        return _class_of("list")(path, columns=columns, images=options.image_root)
    if remote and not path.startswith("http"):
        return _class_of("objects")(path, columns=columns)
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
