"""Average precision as PASCAL VOC defines it, at the overlaps of COCO: what the papers report on VOC.

The rules are those of voc_eval in py-faster-rcnn, at ten overlaps as pascal_voc_evaluation.py of detectron2 asks for
them: sides of a box count pixels (last minus first, plus one), a detection belongs to the object that it overlaps most,
whether or not that one was found already, objects marked as difficult count neither as found nor as missed, and scores
are compared after rounding to three decimals, coordinates to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_fast.transfer.sets import DetectionSet

__all__ = ["OVERLAPS", "ClassPrecision", "Detections", "eleven_points", "voc_precision"]

OVERLAPS = tuple(percent / 100 for percent in range(50, 100, 5))
"""Of AP; the first is that of AP50."""

_FIRST_PIXEL = np.array((1.0, 1.0, 0.0, 0.0))  # In files, pixels are counted from 1, and the last one is in the box.


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What a detector found in images, in any order."""

    image: npt.NDArray[np.int64]
    """(D,) number of the image in the set."""
    boxes: npt.NDArray[np.float32]
    """(D, 4) left, top, right, bottom in pixels of the image as it is on disk."""
    classes: npt.NDArray[np.int64]
    """(D,)"""
    scores: npt.NDArray[np.float32]
    """(D,) 0..1."""
    masks: Sequence[Mapping[str, Any]] | None = None
    """COCO's run lengths of each; None: the detector has no masks."""
    keypoints: npt.NDArray[np.float32] | None = None
    """(D, K, 3) x and y in pixels of the image as it is on disk, the middle of the first one at 0.5, and how likely the
    place is, 0..1; None: the detector has no keypoints."""

    def __len__(self) -> int:
        return len(self.image)

    def chosen(self, rows: npt.NDArray[np.int64]) -> "Detections":
        """Return some of them."""
        return Detections(
            image=self.image[rows],
            boxes=self.boxes[rows],
            classes=self.classes[rows],
            scores=self.scores[rows],
            masks=None if self.masks is None else [self.masks[row] for row in rows.tolist()],
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )


@dataclass(frozen=True, kw_only=True)
class ClassPrecision:
    """Average precisions of one class."""

    name: str
    num_objects: int
    """That are not difficult."""
    at: tuple[float, ...]
    """At each of `OVERLAPS`, 0..1."""
    group: str = ""
    """Of the classes that it belongs to, where figures are also means over groups."""

    @property
    def mean(self) -> float:
        """Over the overlaps."""
        return float(np.mean(self.at))


def voc_precision(found: Detections, truth: DetectionSet) -> list[ClassPrecision]:
    """Return the average precisions of each class of which the set has objects that are not difficult."""
    # Written to a file and read back in the original.
    scores = np.round(found.scores.astype(np.float64), 3)
    boxes = np.round(found.boxes.astype(np.float64) + _FIRST_PIXEL, 1)
    # Equal scores are in the order of images, so that ranks make no difference.
    order = np.lexsort((found.image, -scores))
    precisions: list[ClassPrecision] = []
    for number, name in enumerate(truth.class_names):
        objects = _objects_of(truth, number)
        num_objects = sum(int((~is_difficult).sum()) for _, is_difficult in objects)
        if num_objects == 0:
            continue
        chosen = order[found.classes[order] == number]
        overlap, matched, is_difficult = _match(found.image[chosen], boxes[chosen], objects)
        at = tuple(
            _precision_at(threshold, overlap, matched, is_difficult, num_objects=num_objects) for threshold in OVERLAPS
        )
        precisions.append(ClassPrecision(name=name, num_objects=num_objects, at=at))
    return precisions


def eleven_points(recall: npt.NDArray[np.float64], precision: npt.NDArray[np.float64]) -> float:
    """Return the mean over recalls 0, 0.1 ... 1 of the best precision at that recall or more (VOC 2007).

    Args:
        recall: (D,) after each detection, rising.
        precision: (D,)
    """
    points = [precision[recall >= point] for point in np.arange(0.0, 1.1, 0.1)]
    return sum(float(each.max()) for each in points if len(each)) / 11


_Objects = Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]]


def _objects_of(truth: DetectionSet, number: int) -> _Objects:
    """Return boxes as files have them, and which are difficult, of each image's objects of a class."""
    return [
        (image.boxes[chosen].astype(np.float64) + _FIRST_PIXEL, image.is_difficult[chosen])
        for image in truth.images
        for chosen in (image.classes == number,)
    ]


def _match(
    image: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64], objects: _Objects
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return for each detection its largest overlap, the number of that object, and whether it is difficult."""
    overlap = np.full(len(image), -np.inf)
    matched = np.full(len(image), -1, dtype=np.int64)
    is_difficult = np.zeros(len(image), dtype=np.bool_)
    first = np.concatenate([[0], np.cumsum([len(each) for each, _ in objects])])
    by_image = np.argsort(image, kind="stable")
    for number, places in zip(*_runs(image, by_image), strict=True):
        marked, difficult = objects[number]
        if len(marked):
            of_each = _overlaps(boxes[places], marked)
            best = of_each.argmax(axis=1)
            overlap[places] = of_each[np.arange(len(places)), best]
            matched[places] = first[number] + best
            is_difficult[places] = difficult[best]
    return overlap, matched, is_difficult


def _runs(
    image: npt.NDArray[np.int64], by_image: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """Return the images that have detections, and the places of these."""
    if not len(image):
        return image, []
    numbers, starts = np.unique(image[by_image], return_index=True)
    return numbers, np.split(by_image, starts[1:])


def _overlaps(boxes: npt.NDArray[np.float64], marked: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(D, 4), (N, 4) -> (D, N) intersection over union, in whole pixels."""
    low = np.maximum(boxes[:, None, :2], marked[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], marked[None, :, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=2)
    areas = [(each[:, 2:] - each[:, :2] + 1).prod(axis=1) for each in (boxes, marked)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def _precision_at(
    threshold: float,
    overlap: npt.NDArray[np.float64],
    matched: npt.NDArray[np.int64],
    is_difficult: npt.NDArray[np.bool_],
    *,
    num_objects: int,
) -> float:
    """Return the average precision where an overlap above the threshold counts; detections by falling score."""
    hits = overlap > threshold
    counted = np.flatnonzero(hits & ~is_difficult)
    found = np.zeros(len(overlap), dtype=np.bool_)
    # Of several detections of an object the one with the highest score is right, the others are wrong.
    found[counted[np.unique(matched[counted], return_index=True)[1]]] = True
    wrong = ~found & ~(hits & is_difficult)
    num_found, num_wrong = np.cumsum(found), np.cumsum(wrong)
    precision = num_found / np.maximum(num_found + num_wrong, np.finfo(np.float64).eps)
    return eleven_points(num_found / num_objects, precision)
