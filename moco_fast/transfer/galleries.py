"""Galleries of tests: which images are best and worst, and what is drawn on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.ops import box_iou

from moco_fast.transfer.coco import decoded_mask, drawn_masks
from moco_fast.transfer.loader import decoded
from moco_fast.transfer.metrics import Detections
from moco_fast.transfer.pictures import Gallery, Mark, Panel, ShownImage, encoded_image, encoded_layer
from moco_fast.transfer.pixel_sets import OPEN, PixelSet, read_pixels
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet

__all__ = ["ImageMatches", "detection_gallery", "match_images", "pixel_gallery"]

_OVERLAP = 0.5
_LEAST_SCORE = 0.05
_LEAST_AREA = 0.01
"""Share of an image from which on an area has its name written on it."""

_FOUND = (
    "Boxes of the class that overlap by {overlap:.0%} or more match. What is drawn scores {score:.2f} or more, where "
    "F1 over the whole test set is highest; images are ranked by their own F1, of objects that are found and boxes "
    "that are right."
)
_NAMED = (
    "Images are ranked by their own mean intersection over union, over the classes that are in them or are named there."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageMatches:
    """Which detections are right, and which images."""

    score: float
    """What is at least as high is drawn."""
    is_right: npt.NDArray[np.bool_]
    """(D,) of all detections."""
    is_found: list[npt.NDArray[np.bool_]]
    """For each image (N,), by what is drawn."""
    f1: npt.NDArray[np.float64]
    """(I,) of each image; NaN: it has no object that counts."""
    overlap: npt.NDArray[np.float64]
    """(I,) mean overlap of what is right."""


def match_images(found: Detections, truth: DetectionSet) -> ImageMatches:
    """Match what was found with what is there, each object once, by falling score.

    What matches a difficult object counts neither as right nor as wrong.
    """
    num_all = len(found)
    overlap, counts, matched = np.zeros(num_all), np.ones(num_all, np.bool_), np.full(num_all, -1)
    rows = np.flatnonzero(found.scores >= _LEAST_SCORE)
    rows = rows[np.lexsort((-found.scores[rows], found.image[rows]))]
    starts = np.searchsorted(found.image[rows], np.arange(len(truth) + 1))
    for number, image in enumerate(truth.images):
        of_image = rows[starts[number] : starts[number + 1]]
        for row, place, by in _pairs(found.boxes[of_image], found.classes[of_image], image):
            overlap[of_image[row]], matched[of_image[row]] = by, place
            counts[of_image[row]] = not image.is_difficult[place]
    num_objects = np.array([int((~image.is_difficult).sum()) for image in truth.images], dtype=np.int64)
    is_right = (matched >= 0) & counts
    score = _best_score(found.scores, is_right, counts, int(num_objects.sum()))
    drawn = found.scores >= score
    right, claimed, sums = (
        np.bincount(found.image[drawn & which], weights=weights, minlength=len(truth))
        for which, weights in ((is_right, None), (counts, None), (is_right, overlap[drawn & is_right]))
    )
    f1 = np.where(num_objects > 0, 2 * right / np.maximum(num_objects + claimed, 1), np.nan)
    is_found = [np.zeros(len(image.boxes), dtype=np.bool_) for image in truth.images]
    for row in np.flatnonzero(drawn & (matched >= 0)):
        is_found[found.image[row]][matched[row]] = True
    return ImageMatches(score=score, is_right=is_right, is_found=is_found, f1=f1, overlap=sums / np.maximum(right, 1))


def _pairs(
    boxes: npt.NDArray[np.float32], classes: npt.NDArray[np.int64], image: AnnotatedImage
) -> list[tuple[int, int, float]]:
    """Return detections of an image, by falling score, with the object that each takes and their overlap."""
    if not len(boxes) or not len(image.boxes):
        return []
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(image.boxes)).numpy()  # (D, N)
    overlaps = np.where(classes[:, None] == image.classes[None], overlaps, 0.0)
    pairs: list[tuple[int, int, float]] = []
    for row in np.flatnonzero(overlaps.max(axis=1) >= _OVERLAP).tolist():
        place = int(overlaps[row].argmax())
        if (by := float(overlaps[row, place])) >= _OVERLAP:
            pairs.append((row, place, by))
            if not image.is_difficult[place]:
                overlaps[:, place] = 0.0
    return pairs


def _best_score(
    scores: npt.NDArray[np.float32], is_right: npt.NDArray[np.bool_], counts: npt.NDArray[np.bool_], num_objects: int
) -> float:
    """Return the score from which on detections have the highest F1; a half if none is right."""
    if not is_right.any():
        return 0.5
    order = np.argsort(-scores[counts], kind="stable")
    falling, right = scores[counts][order], np.cumsum(is_right[counts][order])
    f1 = 2 * right / (num_objects + np.arange(1, len(right) + 1))
    # Of equal scores all are drawn or none.
    is_last = np.append(falling[1:] < falling[:-1], True)
    return float(falling[is_last][f1[is_last].argmax()])


def detection_gallery(found: Detections, truth: DetectionSet) -> Gallery:
    """Choose images of a test of a detector, and draw them.

    Args:
        found: in all images.
        truth: the set.
    """
    matches = match_images(found, truth)

    def make(number: int) -> ShownImage:
        image = truth.images[number]
        return ShownImage(
            key=image.key,
            width=image.width,
            height=image.height,
            pixels=encoded_image(decoded(image)),
            value=float(matches.f1[number]),
            truth=_truth_panel(truth, number, matches),
            found=_found_panel(found, truth, number, matches),
        )

    measure = _FOUND.format(overlap=_OVERLAP, score=matches.score)
    return Gallery.of(measure, matches.f1, make, then=matches.overlap)


def _truth_panel(truth: DetectionSet, number: int, matches: ImageMatches) -> Panel:
    image, names, is_found = truth.images[number], truth.class_names, matches.is_found[number]
    points = image.keypoints
    marks = tuple(
        Mark(
            label=label,
            text=names[label] + (" (difficult)" if image.is_difficult[place] else ""),
            box=_four(image.boxes[place]),
            is_matched=bool(is_found[place] or image.is_difficult[place]),
            **_skeleton(points, place, truth),
        )
        for place, label in enumerate(image.classes.tolist())
    )
    if image.outlines is None:
        return Panel(marks=marks)
    masks = drawn_masks(image, height=image.height, width=image.width, is_mirrored=False)
    return Panel(marks=marks, layer=_layer(list(masks), image.classes.tolist(), image))


def _found_panel(found: Detections, truth: DetectionSet, number: int, matches: ImageMatches) -> Panel:
    image, names = truth.images[number], truth.class_names
    rows = np.flatnonzero((found.image == number) & (found.scores >= matches.score))
    points = found.keypoints
    labels = found.classes[rows].tolist()
    marks = tuple(
        Mark(
            label=label,
            text=f"{names[label]} {found.scores[row]:.2f}",
            box=_four(found.boxes[row]),
            is_matched=bool(matches.is_right[row]),
            **_skeleton(points, row, truth),
        )
        for row, label in zip(rows.tolist(), labels, strict=True)
    )
    if found.masks is None:
        return Panel(marks=marks)
    masks = [decoded_mask(found.masks[row]) for row in rows.tolist()]
    return Panel(marks=marks, layer=_layer(masks, labels, image))


def _four(box: npt.NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(float(each), 1) for each in box)
    return left, top, right, bottom


def _skeleton(points: npt.NDArray[np.float32] | None, place: int, truth: DetectionSet) -> dict[str, Any]:
    """Return the keypoints of one of several objects, (N, K, 3), that are there, and the lines between them."""
    if points is None:
        return {}
    seen = {
        number: (round(float(x), 1), round(float(y), 1)) for number, (x, y, value) in enumerate(points[place]) if value
    }
    lines = truth.keypoints.lines if truth.keypoints is not None else ()
    return {
        "keypoints": tuple(seen.values()),
        "lines": tuple((*seen[first], *seen[last]) for first, last in lines if first in seen and last in seen),
    }


def _layer(masks: list[npt.NDArray[np.uint8]], labels: list[int], image: AnnotatedImage) -> str:
    """Return one layer of all masks; where they overlap, the smaller one lies above."""
    layer = np.full((image.height, image.width), -1, dtype=np.int64)
    for place in sorted(range(len(masks)), key=lambda place: -int(masks[place].sum())):
        layer[masks[place] > 0] = labels[place]
    return encoded_layer(layer)


def pixel_gallery(
    values: npt.NDArray[np.float64], truth: PixelSet, name: Callable[[Image.Image], npt.NDArray[np.int64]]
) -> Gallery:
    """Choose images of a test of segmentation, and draw them.

    Args:
        values: (I,) mean intersection over union of each image; NaN: it is not shown.
        truth: the set.
        name: gives the class of each pixel of an image, (H, W).
    """

    def make(number: int) -> ShownImage:
        image, classes = read_pixels(truth.images[number], truth.table)
        there = np.where(classes == OPEN, -1, classes.astype(np.int64))
        return ShownImage(
            key=truth.images[number].key,
            width=image.width,
            height=image.height,
            pixels=encoded_image(image),
            value=float(values[number]),
            truth=_area_panel(there, truth.class_names),
            found=_area_panel(name(image), truth.class_names),
        )

    return Gallery.of(_NAMED, values, make)


def _area_panel(labels: npt.NDArray[np.int64], names: tuple[str, ...]) -> Panel:
    # What is not an object stays clear.
    labels = np.where(labels == names.index("background"), -1, labels) if "background" in names else labels
    marks: list[Mark] = []
    for label in np.unique(labels[labels >= 0]).tolist():
        places = np.argwhere(labels == label)
        if len(places) >= _LEAST_AREA * labels.size:
            # A pixel of the area itself, which the middle of a ring is not.
            row, column = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()].tolist()
            marks.append(Mark(label=label, text=names[label], point=(float(column), float(row))))
    return Panel(marks=tuple(marks), layer=encoded_layer(labels))
