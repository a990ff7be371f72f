"""Set of images with boxes, in whatever layout it lies on disk. Imports no torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.ground.digests import running_digest
from shards.ground.units import counted

__all__ = ["AnnotatedImage", "DetectionSet", "Malformed", "Outline", "refuse_malformed"]

_MOST_NAMED = 3


Outline = Sequence[npt.NDArray[np.float32]] | Mapping[str, Any]
"""An object's shape: polygons, each (corners, 2) x and y in pixels, or COCO's run lengths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """An image and what is marked in it."""

    path: Path
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
    image_id: int = 0
    """Its number in the annotations, where they have numbers."""


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
    class_names: tuple[str, ...]
    images: Sequence[AnnotatedImage]
    malformed: Sequence[Malformed] = ()
    """Images that were left out."""
    malformed_objects: Sequence[Malformed] = ()
    """Objects that were left out of images that were not."""
    annotations: Path | None = None
    """COCO's file, which its test reads; None: the images say it all."""
    category_ids: tuple[int, ...] = ()
    """Of each class, in that file."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def with_boxes(self) -> "DetectionSet":
        """The same set without the images in which nothing is marked, which training does not look at."""
        return replace(self, images=[image for image in self.images if len(image.boxes)])

    @property
    def lies(self) -> npt.NDArray[np.bool_]:
        """(len,): whether an image is wider than high."""
        return np.array([image.width > image.height for image in self.images], dtype=np.bool_)

    @property
    def identity(self) -> str:
        """Digest of names, sizes, boxes and classes."""
        whole = running_digest()
        whole.update(json.dumps(self.class_names).encode())
        for image in self.images:
            whole.update(f"{image.key} {image.height} {image.width} {len(image.boxes)} ".encode())
            whole.update(image.boxes.tobytes() + image.classes.tobytes())
        return whole.hexdigest()


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
