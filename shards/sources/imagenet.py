"""ImageNet (ILSVRC 2012) as it is downloaded: tars of images, and the devkit that names the validation images' classes.

    ILSVRC2012_img_train.tar        a tar for each class, n01440764.tar, named by WordNet id
    ILSVRC2012_img_val.tar          ILSVRC2012_val_00000001.JPEG and so on
    ILSVRC2012_devkit_t12.tar.gz    ILSVRC2012_devkit_t12/data/: meta.mat, ILSVRC2012_validation_ground_truth.txt

The devkit's own numbers of classes are in another order than WordNet ids; labels here are WordNet ids in both sets.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from shards.config import SourceOptions
from shards.ground.errors import PackError
from shards.sources.base import Found, Input, Source, printable
from shards.sources.parts import chosen_part
from shards.sources.tarfiles import TarSource
from shards.storage.small_files import small_files
from shards.storage.stores import ByteFile, is_url, open_bytes
from shards.storage.tar import BLOCK, EndOfTar, TarError, parse_header
from shards.storage.tar_reading import members, tar_reader

__all__ = ["ImageNetSource"]

_ARCHIVE = re.compile(r"ILSVRC2012_img_(train|val|test)\w*\.tar")
_FIRST_MEMBER = {"train": re.compile(rb"n\d{8}\.tar"), "val": re.compile(rb"ILSVRC2012_val_\d{8}\.JPEG")}
_CLASS_TAR = re.compile(rb"(n\d{8})\.tar")
_VAL_IMAGE = re.compile(rb"ILSVRC2012_val_(\d{8})\.JPEG")
_DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class _Window:
    """Some bytes of a file as a file."""

    def __init__(self, file: ByteFile, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self.size = size

    def read(self, start: int, count: int) -> bytes:
        """Return bytes, counted from where the window begins."""
        return self._file.read(self._start + start, min(count, self.size - start))


class ImageNetSource(TarSource):
    """One of ImageNet's three tars of images, each image read where it is in the tar.

    Args:
        path: path or URL.
        part: train, val or test.
        devkit: path or URL of the devkit, for the labels of val; None: they are not wanted.
        root: absolute path, for other processes.
    """

    def __init__(self, path: str, part: str = "", devkit: str | None = None, root: str = "") -> None:
        super().__init__(path, root=root)
        self._part = part
        self._devkit = devkit

    @classmethod
    def recognize(cls, path: str, options: SourceOptions) -> Self | None:
        """Return a source for one of the tars, or for a folder that holds some of them.

        Raises:
            ValueError: the subset is not there or was not chosen, or the labels of val are wanted without the devkit.
        """
        parts = _parts_of(path)
        if not parts:
            return None
        part = chosen_part(path, parts, options.subset)
        archive = parts[part]
        devkit = _find_devkit(archive) if part == "val" and options.labeled else None
        return cls(archive, part, devkit)

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        return {"kind": "imagenet", "path": self.path, "root": self._root}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found]:
        """List the images in the tar's order."""
        del spool
        try:
            yield from self._train() if self._part == "train" else self._flat()
        except (OSError, TarError) as error:
            raise PackError(
                f"{self.path} cannot be read to its end ({error}): its images would be lost silently; "
                "get the whole archive"
            ) from error

    def _train(self) -> Iterator[Input | Found]:
        file, classes, num_images = self._file(), set[str](), 0
        for entry in members(tar_reader(file, self.is_remote)):
            name = _CLASS_TAR.fullmatch(entry.name.rpartition(b"/")[2])
            if name is None:
                yield Input(entry.name, None, None, entry.offset, entry.size)
                continue
            label = name[1].decode()
            classes.add(label)
            for image in members(tar_reader(_Window(file, entry.offset, entry.size), self.is_remote)):
                offset, size = entry.offset + image.offset if image.is_file else -1, image.size
                yield Input(entry.name + b"/" + image.name, label, label, offset, size)
                num_images += 1
        yield Found(f"{self.path}: ImageNet's training images, {num_images:,} of {len(classes):,} WordNet ids")

    def _flat(self) -> Iterator[Input | Found]:
        truth = None if self._devkit is None else _ground_truth(self._devkit)
        num_images = 0
        for entry in members(tar_reader(self._file(), self.is_remote)):
            number = _VAL_IMAGE.fullmatch(entry.name.rpartition(b"/")[2])
            label = None
            if truth is not None and number is not None:
                if not 0 < int(number[1]) <= len(truth):
                    raise PackError(
                        f"{self.path} holds {printable(entry.name)}, but {self._devkit} names the classes of "
                        f"{len(truth):,} images: get the devkit that belongs to it"
                    )
                label = truth[int(number[1]) - 1]
            num_images += number is not None or truth is None
            yield Input(entry.name, None, label, entry.offset, entry.size)
        if truth is not None and num_images != len(truth):
            raise PackError(
                f"{self.path} holds {num_images:,} images, but {self._devkit} names the classes of {len(truth):,}: "
                "get the whole archive"
            )
        labels = "without labels" if truth is None else f"of {len(set(truth)):,} WordNet ids by {self._devkit}"
        yield Found(
            f"{self.path}: ImageNet's {self._part} images, {num_images:,} {labels}", tuple(sorted(set(truth or ())))
        )


def _parts_of(path: str) -> dict[str, str]:
    """Return the tars of images that a path names, or holds, by part."""
    if not is_url(path) and Path(path).is_dir():
        found = (_ARCHIVE.fullmatch(name.name) for name in sorted(Path(path).iterdir()))
        return {match[1]: f"{path.rstrip('/')}/{match[0]}" for match in found if match is not None}
    match = _ARCHIVE.fullmatch(path.rpartition("/")[2])
    if match is not None:
        return {match[1]: path}
    return {} if is_url(path) or not path.endswith(".tar") else _part_by_content(path)


def _part_by_content(path: str) -> dict[str, str]:
    """Recognize a tar that has another name by its first member."""
    with suppress(OSError, TarError, EndOfTar):
        first = parse_header(open_bytes(path).read(0, BLOCK)).name.rpartition(b"/")[2]
        return {part: path for part, name in _FIRST_MEMBER.items() if name.fullmatch(first)}
    return {}


def _find_devkit(archive: str) -> str:
    folder = archive.rpartition("/")[0]
    for name in _DEVKITS:
        path = f"{folder}/{name}" if folder else name
        if is_url(path) and name.endswith(".gz"):
            return path  # where nothing is there, reading it says so
        if not is_url(path) and os.path.exists(path):  # noqa: PTH110 - the text that the user gave is kept as it is
            return path
    raise ValueError(
        f"the classes of {archive} are in ILSVRC2012_devkit_t12.tar.gz: put it into the same folder, or pack with "
        "--labels none"
    )


def _ground_truth(devkit: str) -> list[str]:
    """Return the WordNet id of each validation image, in the order of their numbers."""
    scipy_io: Any = import_module("scipy.io")
    found = small_files(devkit, {"meta.mat", _GROUND_TRUTH})
    try:
        synsets: Any = scipy_io.loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
        ids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return [str(ids[int(line)]) for line in found[_GROUND_TRUTH].split()]
    # What a damaged matrix runs into within scipy can be anything.
    except Exception as error:
        raise PackError(
            f"{devkit} is not ImageNet's devkit of 2012, or damaged ({type(error).__name__}: {error}): get it again"
        ) from error
