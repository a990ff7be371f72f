"""Benchmarks with annotations in the layouts in which they are published: each image with what is marked in it.

    VOC2007/JPEGImages/000005.jpg                 VOC: any number of years, or folders like them
    VOC2007/Annotations/000005.xml
    VOC2007/ImageSets/Main/trainval.txt

    train2017/000000000009.jpg                    COCO
    annotations/instances_train2017.json          and those of LVIS, also beside `annotations`

    leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png                Cityscapes
    gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png

What belongs to one image becomes a member of its sample. What belongs to many, lists and .json files, is kept as it is.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shards.ground.errors import PackError
from shards.ground.units import counted
from shards.sources.base import Aside, Found, Input, Source, printable
from shards.sources.folder import read_file
from shards.sources.samples import extension
from shards.storage.file_kinds import IMAGE_SUFFIXES, litter
from shards.storage.stores import is_url

__all__ = ["AnnotationFile", "BenchmarkSource", "refuse_shared"]


class AnnotationFile(NamedTuple):
    """A file of an image's annotation."""

    extension: str
    """Of the member of the sample, such as `xml` or `labelids.png`."""
    path: str
    """In the benchmark."""
    data: bytes


@dataclass(frozen=True, kw_only=True)
class _BenchmarkLayout:
    """Where a benchmark has what; paths are from its folder on."""

    title: str
    marks: tuple[tuple[str, ...], ...]
    """What a folder of this layout holds: of each of these, one of several patterns of paths."""
    image: re.Pattern[str]
    """Of an image's path, with groups that the members' paths are made of."""
    members: Mapping[str, str]
    """Path of each annotation of an image, by extension of the member."""
    files: re.Pattern[str]
    """Of the path of what belongs to many images."""


_LAYOUTS = {
    "voc": _BenchmarkLayout(
        title="PASCAL VOC's layout",
        marks=(("*/JPEGImages",), ("*/ImageSets",)),
        image=re.compile(r"(?P<year>[^/]+)/JPEGImages/(?P<name>.+)\.[^./]+"),
        members={
            "xml": "{year}/Annotations/{name}.xml",
            "class.png": "{year}/SegmentationClass/{name}.png",
            "classaug.png": "{year}/SegmentationClassAug/{name}.png",
            "object.png": "{year}/SegmentationObject/{name}.png",
        },
        files=re.compile(r"[^/]+/ImageSets/.+\.txt"),
    ),
    "cityscapes": _BenchmarkLayout(
        title="Cityscapes",
        marks=(("leftImg8bit",), ("gtFine",)),
        image=re.compile(r"leftImg8bit/(?P<name>.+)_leftImg8bit\.png"),
        members={
            "labelids.png": "gtFine/{name}_gtFine_labelIds.png",
            "instanceids.png": "gtFine/{name}_gtFine_instanceIds.png",
            "polygons.json": "gtFine/{name}_gtFine_polygons.json",
        },
        files=re.compile(r"(?!)"),
    ),
    "coco": _BenchmarkLayout(
        title="COCO's layout",
        marks=(("annotations/*.json", "lvis_*.json"),),
        image=re.compile(r"(?!annotations/)[^/]+/.+"),
        members={},
        files=re.compile(r"(annotations/.+|lvis_[^/]+)\.json"),
    ),
}


class BenchmarkSource:
    """All images of a benchmark's folder.

    Args:
        path: of the folder, as the user wrote it; also of one of VOC's years.
        follow_links: whether links to folders are followed.
        root: absolute path of the folder that paths in the benchmark begin at, for other processes.
        layout: by name; found from the folder if empty.
        only: folder below the root; empty: all of them.

    Raises:
        ValueError: it is not a folder, or in none of the layouts.
    """

    is_remote = False

    def __init__(
        self, path: str, *, follow_links: bool = False, root: str = "", layout: str = "", only: str = ""
    ) -> None:
        self.path = path
        self._root, self._layout, self._only, self._follows = root, layout, only, follow_links
        if not root:
            self._root, self._layout, self._only = _recognized(path)
        self._how = _LAYOUTS[self._layout]
        # A year's own folder is part of its paths.
        self._shown = os.path.dirname(path.rstrip("/")) or "." if self._only else path.rstrip("/")  # noqa: PTH120 - as the user wrote it

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        own = {"root": self._root, "layout": self._layout, "only": self._only, "follow_links": self._follows}
        return {"kind": "benchmark", "path": self.path, **own}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found | Aside]:
        """List the images, sorted by path, and count what belongs to none."""
        del spool
        paths = self._walk()
        images = [path for path in paths if self._is_image(path)]
        taken = {place for image in images for place in self._places(image).values()}.union(images)
        yield from (Input(os.fsencode(path)) for path in images)
        for path in paths:
            if path not in taken and not self._how.files.fullmatch(path):
                yield Aside(litter(os.fsencode(path)) or extension(os.fsencode(path)), os.fsencode(path))
        num_marked = len(taken.intersection(paths)) - len(images)
        what = f"{counted(len(images), 'image')} with {counted(num_marked, 'annotation')} of their own"
        yield Found(f"{self.path}: {self._how.title}, {what}, {counted(len(self.files()), 'file')} of many images")

    def members(self, name: bytes) -> Iterator[AnnotationFile]:
        """Read what belongs to an image. Raises PackError: a file is there and cannot be read."""
        for ending, path in self._places(os.fsdecode(name)).items():
            place = os.path.join(self._root, path)  # noqa: PTH118 - names as they are
            if os.path.lexists(place):
                yield AnnotationFile(ending, path, self.read_annotation(path))

    def paths(self) -> list[str]:
        """Return the paths of all images, and of what belongs to many of them, sorted."""
        return [path for path in self._walk() if self._is_image(path) or self._how.files.fullmatch(path)]

    def files(self) -> list[str]:
        """Return the paths of what belongs to many images, sorted."""
        return [path for path in self._walk() if self._how.files.fullmatch(path)]

    def read_annotation(self, path: str) -> bytes:
        """Read what belongs to an image, or one of `files`. Raises PackError: it cannot be read."""
        try:
            return Path(self._root, path).read_bytes()
        except OSError as error:
            raise PackError(
                f"cannot read {self._root}/{path} ({error.strerror}): its annotations would be lost; fix this and run "
                "the same command again"
            ) from None

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of an image; `offset` and `size` are not used."""
        del offset, size
        return read_file(os.fsencode(self._root) + b"/" + name)

    def describe(self, name: bytes) -> str:
        """Return the path of the image."""
        return printable(os.fsencode(self._shown) + b"/" + name)

    def _is_image(self, path: str) -> bool:
        # Notes, labels of other tools and the like beside images are left aside, not rejected as damaged images.
        ending = Path(path).suffix.lower().removeprefix(".")
        may_be = not ending or ending in IMAGE_SUFFIXES
        return may_be and litter(os.fsencode(path)) is None and self._how.image.fullmatch(path) is not None

    def _places(self, image: str) -> dict[str, str]:
        match = self._how.image.fullmatch(image)
        assert match is not None
        return {ending: path.format(**match.groupdict()) for ending, path in self._how.members.items()}

    def _walk(self) -> list[str]:
        """Return the paths of all files from the root on, sorted. Raises PackError: a folder cannot be listed."""
        found: list[str] = []
        top = f"{self._root}/{self._only}".rstrip("/")
        for folder, inner, names in os.walk(top, onerror=_refuse, followlinks=self._follows):
            for path in [f"{folder}/{name}" for name in inner if os.path.islink(f"{folder}/{name}")]:  # noqa: PTH114 - names as they are
                if not self._follows:
                    raise PackError(
                        f"{printable(os.fsencode(path))} is a link to a folder: give --follow-links to pack what it "
                        "leads to"
                    )
                if f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/"):
                    raise PackError(f"{printable(os.fsencode(path))} is a link to a folder that holds it: remove it")
            found += [os.path.relpath(f"{folder}/{name}", self._root) for name in names]
        return sorted(found)


def refuse_shared(sources: Iterable[BenchmarkSource]) -> None:
    """Refuse sources that have a path in common: a set holds one file of a path. Raises ValueError."""
    found: dict[str, BenchmarkSource] = {}
    for source in sources:
        for path in source.paths():
            if (other := found.setdefault(path, source)) is not source:
                raise ValueError(f"{path} is in {other.path} and in {source.path}, and a set has one: pack them apart")


def _refuse(error: OSError) -> None:
    raise PackError(
        f"cannot list {error.filename} ({error.strerror}): what is in it would be lost silently; make it readable"
    ) from error


def _recognized(path: str) -> tuple[str, str, str]:
    """Return root, name of the layout, and the folder below the root that is meant; empty: all. Raises ValueError."""
    if is_url(path) or not Path(path).is_dir():
        raise ValueError(f"{path}: --annotations takes a folder on this machine, a benchmark as it is unpacked")
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name
    if (folder / "JPEGImages").is_dir() and (folder / "ImageSets").is_dir():
        return str(folder.parent), "voc", folder.name
    for name, layout in _LAYOUTS.items():
        if all(any(next(folder.glob(mark), None) for mark in either) for either in layout.marks):
            return str(folder), name, ""
    raise ValueError(
        f"{path} is not in a layout that --annotations knows: give the folder of VOC's years or one of them "
        "(JPEGImages, ImageSets), of COCO (annotations/*.json beside folders of images) or of Cityscapes (leftImg8bit, "
        "gtFine), as docs/transfer.md describes them"
    )
