"""Set of images with boxes, in whatever layout it lies on disk. Imports no torch."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.ground.digests import digest

__all__ = ["AnnotatedImage", "DetectionSet", "Malformed", "refuse_malformed"]

_MOST_NAMED = 3


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


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """An image that is left out."""

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
    """What was left out."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def with_boxes(self) -> "DetectionSet":
        """The same set without the images in which nothing is marked, which training does not look at."""
        kept = [image for image in self.images if len(image.boxes)]
        return DetectionSet(where=self.where, class_names=self.class_names, images=kept, malformed=self.malformed)

    @property
    def lies(self) -> npt.NDArray[np.bool_]:
        """(len,): whether an image is wider than high."""
        return np.array([image.width > image.height for image in self.images], dtype=np.bool_)

    @cached_property
    def identity(self) -> str:
        """Digest of names, sizes and annotations."""
        told = [
            [image.key, image.height, image.width, image.boxes.tolist(), image.classes.tolist()]
            for image in self.images
        ]
        return digest(json.dumps([self.class_names, told]).encode())


def refuse_malformed(malformed: Sequence[Malformed], num_images: int, where: str, *, at_most: float) -> list[str]:
    """Return a line for each reason why images are left out, with the first of them.

    Args:
        malformed: what is left out.
        num_images: of the set, with those.
        where: the set, for people.
        at_most: share that may be left out.

    Raises:
        ValueError: it is more.
    """
    lines = [
        f"{where}: {count:,} left out, {reason}: "
        + ", ".join([each.key for each in malformed if each.reason == reason][:_MOST_NAMED])
        + (", ..." if count > _MOST_NAMED else "")
        for reason, count in Counter(each.reason for each in malformed).most_common()
    ]
    if len(malformed) > at_most * num_images:
        raise ValueError(
            f"{len(malformed):,} of {num_images:,} images of {where} cannot be used, more than --max-malformed "
            f"{at_most:g} allows ({'; '.join(lines)}): repair them, or allow a larger share"
        )
    return lines
