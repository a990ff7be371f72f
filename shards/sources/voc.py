"""PASCAL VOC as it is downloaded: VOCdevkit/VOC2007 and later years, unpacked or as a tar.

    ImageSets/Main/trainval.txt              names of a part's images
    ImageSets/Main/aeroplane_trainval.txt    of each: 1 holds such objects, -1 none, 0 only difficult ones
    JPEGImages/000005.jpg

An image may hold objects of several classes, so its label is a set of them. Difficult ones count neither way, as in the
challenge's own evaluation.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.ground.units import counted
from shards.sources.base import Found, Input, LabelSet, Source, printable
from shards.sources.folder import read_file
from shards.sources.parts import chosen_part
from shards.storage.stores import ByteFile, absolute, is_url, open_bytes
from shards.storage.tar_reading import members, read_member, tar_reader

__all__ = ["VocSource"]

_MAIN = "ImageSets/Main/"
_IMAGES = "JPEGImages/"
_ARCHIVE = re.compile(r"VOC(trainval|test)_.*\.tar")
_YEAR = re.compile(r"VOC\d{4}")


class _Span(NamedTuple):
    offset: int
    size: int


class VocSource:
    """The images of one part of one year, each with a set of classes.

    Args:
        path: the folder of a year, such as VOCdevkit/VOC2007, or a tar of one.
        part: train, val, trainval or test.
        root: absolute path, for other processes.
    """

    def __init__(self, path: str, part: str = "", root: str = "") -> None:
        self.path = path
        self._part = part
        self._root = root or absolute(path)
        self.is_remote = is_url(path)
        self._is_tar = self.is_remote or not Path(self._root).is_dir()
        self._found: dict[str, dict[str, _Span]] = {}

    @classmethod
    def recognize(cls, path: str, options: SourceOptions) -> Self | None:
        """Return a source for the folder of a year, for VOCdevkit with one year, or for a tar.

        Raises:
            ValueError: the subset is not there or was not chosen, or there are several years.
        """
        base = path.rstrip("/").rpartition("/")[2]
        if is_url(path) or not Path(path).is_dir():
            if _ARCHIVE.fullmatch(base) is None or not (is_url(path) or Path(path).is_file()):
                return None
        else:
            years = _years(Path(path))
            if len(years) > 1:
                raise ValueError(f"{path} holds {', '.join(years)}: give one of them, such as {years[0]}")
            if not years:
                return None
            [path] = years
        source = cls(path)
        parts = {name for name in source._lists() if "_" not in name}
        source._part = chosen_part(path, parts, options.subset)
        return source

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "voc", "path": self.path, "root": self._root}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found]:
        """List the images in the order of the part's list."""
        del spool
        lists = self._lists()
        names = [line.split()[0] for line in lists[self._part].splitlines() if line.strip()]
        classes = sorted(name.rpartition("_")[0] for name in lists if name.endswith(f"_{self._part}"))
        if not classes:
            raise PackError(f"{self.path} has no lists of classes such as {_MAIN}cat_{self._part}.txt: get all of it")
        signs = {name: _signs(lists[f"{name}_{self._part}"], f"{self.path}/{_MAIN}{name}") for name in classes}
        places = self._places(_IMAGES) if self._is_tar else {}
        for image in names:
            try:
                of_image = [(name, signs[name][image]) for name in classes]
            except KeyError:
                raise PackError(
                    f"{self.path}: {image} of {_MAIN}{self._part}.txt is not in the lists of all classes: get it again"
                ) from None
            label = LabelSet(*(tuple(name for name, sign in of_image if sign == wanted) for wanted in (1, 0)))
            place = places.get(f"{image}.jpg", _Span(-1, -1))
            yield Input(f"{_IMAGES}{image}.jpg".encode(), None, label, *place)
        what = f"{counted(len(names), 'image')}, each with a set of {len(classes)} classes"
        yield Found(f"{self.path}: PASCAL VOC, {self._part}, {what}", tuple(classes))

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of an image."""
        if not self._is_tar:
            return read_file(os.fsencode(self._root) + b"/" + name)
        if offset < 0:
            raise Rejected("unreadable", "not in the archive")
        data = read_member(self._file(), offset, size)
        if size >= 0 and len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        return data

    def describe(self, name: bytes) -> str:
        """Return the path of the image."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"

    def _file(self) -> ByteFile:
        return open_bytes(self._root)

    def _lists(self) -> dict[str, str]:
        """Return the lists of images, by name without `.txt`."""
        if self._is_tar:
            places = self._places(_MAIN)
            found = {name: read_member(self._file(), *place).decode() for name, place in places.items()}
        else:
            found = {path.name: path.read_text() for path in (Path(self._root) / _MAIN).glob("*.txt")}
        return {name.removesuffix(".txt"): text for name, text in found.items() if name.endswith(".txt")}

    def _places(self, folder: str) -> dict[str, _Span]:
        """Return where the files of a folder are in the tar, by name."""
        if not self._found:
            for entry in members(tar_reader(self._file(), self.is_remote)):
                inside, _, name = f"/{os.fsdecode(entry.name)}".rpartition("/")
                for wanted in (_MAIN, _IMAGES):
                    if entry.is_file and inside.endswith(f"/{wanted.rstrip('/')}"):
                        self._found.setdefault(wanted, {})[name] = _Span(entry.offset, entry.size)
        return self._found.get(folder, {})


def _years(folder: Path) -> list[str]:
    """Return the folders of years at a path or right below it."""
    candidates = [folder, *sorted(path for path in folder.iterdir() if _YEAR.fullmatch(path.name))]
    return [str(path) for path in candidates if (path / _MAIN).is_dir() and (path / _IMAGES).is_dir()]


def _signs(text: str, where: str) -> dict[str, int]:
    """Return 1, 0 or -1 for each image that a class's list names. Raises PackError."""
    try:
        return {name: int(sign) for name, sign in (line.split() for line in text.splitlines() if line.strip())}
    except ValueError:
        raise PackError(f"{where}: a line is not a name and 1, 0 or -1: get it again") from None
