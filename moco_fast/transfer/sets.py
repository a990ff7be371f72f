"""Set of images with boxes, in whatever layout it lies on disk. Imports no torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from moco_fast.transfer.keypoints import Keypoints
from shards.ground.digests import running_digest
from shards.ground.units import counted
from shards.images.formats import orientation_of
from shards.sets.benchmark import AnyPath, PackedPath

__all__ = [
    "AnnotatedImage",
    "DetectionSet",
    "Malformed",
    "Outline",
    "as_shown",
    "opened_image",
    "read_list",
    "refuse_malformed",
    "size_as_shown",
]

_MOST_NAMED = 3
_DEEP = "has more than 8 bits per channel: convert it to 8"
_LYING_DOWN = (5, 6, 7, 8)  # orientations of EXIF in which height and width change places


Outline = Sequence[npt.NDArray[np.float32]] | Mapping[str, Any]
"""An object's shape: polygons, each (corners, 2) x and y in pixels, or COCO's run lengths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """An image and what is marked in it."""

    path: AnyPath
    key: str
    """Its name within the set."""
    height: int
    width: int
    boxes: npt.NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels, from 0 to width or height."""
    classes: npt.NDArray[np.int64]
    """(N,) from 0."""
    is_difficult: npt.NDArray[np.bool_]
    """(N,): whether finding it or not does not count in the test."""
    outlines: Sequence["Outline"] | None = None
    """Of each object; None: there are no masks."""
    keypoints: npt.NDArray[np.float32] | None = None
    """(N, K, 3) of each object: x and y in pixels, the middle of the first one at 0.5, and 0 where a keypoint is not
    marked, 1 where it is but hidden, 2 where it is visible; None: objects have no keypoints."""
    image_id: int = 0
    """Its number in the annotations, where they have numbers."""
    digest: str = ""
    """Of a file of its own that it is annotated in, of which the test reads more than is here."""


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """An image, or an object in one, that is left out."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSet:
    """Images with boxes, in a fixed order."""

    where: str
    """For people."""
    rules: Literal["voc", "coco", "lvis", "cityscapes"] = "voc"
    """Whose rules measure what is found in it."""
    class_names: tuple[str, ...]
    images: Sequence[AnnotatedImage]
    malformed: Sequence[Malformed] = ()
    """Images that were left out."""
    malformed_objects: Sequence[Malformed] = ()
    """Objects that were left out of images that were not."""
    annotations: AnyPath | None = None
    """File of COCO or LVIS, which its test reads; None: there is none for all images."""
    category_ids: tuple[int, ...] = ()
    """Of each class, in that file."""
    keypoints: Keypoints | None = None
    """Of each object; None: they have no keypoints."""
    groups: tuple[str, ...] = ()
    """Of each class, where figures are also means over groups: how frequent classes of LVIS are."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def with_boxes(self) -> "DetectionSet":
        """The same set without the images in which nothing is marked, which training does not look at."""
        return replace(self, images=[image for image in self.images if len(image.boxes)])

    @property
    def has_outlines(self) -> bool:
        """Whether objects have outlines."""
        return any(image.outlines is not None for image in self.images)

    def with_keypoints(self, least: int) -> "DetectionSet":
        """Return the same set without the images in which fewer keypoints are marked, over all objects."""
        marked = [0 if each.keypoints is None else int((each.keypoints[..., 2] > 0).sum()) for each in self.images]
        kept = [image for image, count in zip(self.images, marked, strict=True) if count >= least]
        return replace(self, images=kept)

    @property
    def lies(self) -> npt.NDArray[np.bool_]:
        """(len,): whether an image is wider than high."""
        return np.array([image.width > image.height for image in self.images], dtype=np.bool_)

    @property
    def identity(self) -> str:
        """Digest of names, sizes and all that is marked."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        whole = running_digest()
        whole.update(json.dumps(self.class_names).encode())
        for image in self.images:
            whole.update(f"{image.key} {image.height} {image.width} {len(image.boxes)} {image.digest}".encode())
            whole.update(image.boxes.tobytes() + image.classes.tobytes() + image.is_difficult.tobytes())
        if self.annotations is not None:
            # Outlines, and crowds, which only the test looks at.
            whole.update(self.annotations.read_bytes())
        return whole.hexdigest()


def read_list(path: AnyPath) -> list[str]:
    """Return the names in a list of images of VOC.

    The first column: lists of one class have a second one, and some lists of DeepLab have paths of images and classes.

    Raises:
        ValueError: it names no image, or is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: write it so") from None
    first = [line.split()[0] for line in lines if line.strip()]
    if not first:
        raise ValueError(f"{path} names no image: unpack the set again, or name another part")
    folder = "JPEGImages/"
    return [PurePosixPath(name.partition(folder)[2]).stem if folder in name else name for name in first]


def as_shown(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB, turned as its EXIF orientation says: so detectron2 reads it.

    Raises:
        OSError: it cannot be decoded, or has more than 8 bits per channel, which Pillow would cut off at 255.
    """
    if is_deep(image):
        raise OSError(f"it {_DEEP}")
    return (image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Return whether an opened image has one channel of 16 or 32 bits."""
    return image.mode.startswith(("I", "F"))


def opened_image(path: AnyPath) -> Image.Image:
    """Open an image to decode it; in shards, its bytes are checked first. Raises what Pillow raises."""
    return Image.open(BytesIO(path.read_bytes()) if isinstance(path, PackedPath) else path)


class _DeepError(OSError):
    pass


def size_as_shown(path: AnyPath, told: tuple[int, int] | None = None) -> tuple[int, int] | str:
    """Return width and height of an image, once it is turned, from its header, or why it cannot be used.

    Args:
        path: of the image.
        told: width and height that its annotation is of; None: it does not say.
    """
    try:
        width, height, orientation = _header(path)
    except FileNotFoundError:
        return "has no image"
    except _DeepError:
        return _DEEP
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "is no image"
    shown = (height, width) if orientation in _LYING_DOWN else (width, height)
    if told is None or told == shown:
        return shown
    if told == (width, height):
        return "is turned by its EXIF orientation, and its annotation is not"
    return "is of another size than its annotation says"


def _header(path: AnyPath) -> tuple[int, int, int]:
    known = path.image_header() if isinstance(path, PackedPath) else None
    if known is not None:
        return known
    with path.open("rb") as file, Image.open(file) as image:
        if is_deep(image):
            raise _DeepError
        return *image.size, orientation_of(image)


def refuse_malformed(
    malformed: Sequence[Malformed], num_all: int, where: str, *, at_most: float, what: str = "image"
) -> list[str]:
    """Return a line for each reason why images or objects are left out, with the first of them.

    Args:
        malformed: what is left out.
        num_all: of the set, with those.
        where: the set, for people.
        at_most: share that may be left out.
        what: is left out, in the singular.

    Raises:
        ValueError: it is more.
    """
    lines = [
        f"{where}: {counted(count, what)} left out, {reason}: "
        + ", ".join([each.key for each in malformed if each.reason == reason][:_MOST_NAMED])
        + (", ..." if count > _MOST_NAMED else "")
        for reason, count in Counter(each.reason for each in malformed).most_common()
    ]
    if len(malformed) > at_most * num_all:
        raise ValueError(
            f"{len(malformed):,} of {counted(num_all, what)} of {where} cannot be used, more than --max-malformed "
            f"{at_most:g} allows ({'; '.join(lines)}): repair them, or allow a larger share"
        )
    return lines
