"""Layout of Cityscapes, read as it is, and its benchmark's measure of instances.

leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_instanceIds.png     1000 * class + number, or the class alone
"""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.transfer.coco import encoded_masks
from moco_fast.transfer.metrics import OVERLAPS, ClassPrecision, Detections
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, Malformed, size_as_shown
from shards.ground.digests import running_digest
from shards.sets.benchmark import AnyPath, open_benchmark

__all__ = [
    "CITYSCAPES_CLASSES",
    "cityscapes_precision",
    "find_cityscapes",
    "read_cityscapes",
    "step_precision",
]

# cityscapesscripts/helpers/labels.py of mcordts/cityscapesScripts: name and id of each trainId.
CITYSCAPES_CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""What the benchmark counts, by the numbers in its files."""

_NAMES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_CLASSES = {name: CITYSCAPES_CLASSES[name] for name in _NAMES}
_LAST_CLASS = 33
_VOID = tuple(set(range(_LAST_CLASS + 1)) - set(CITYSCAPES_CLASSES.values()))
_FIRST_INSTANCE = 1000  # What is below is a class, whose objects are not told apart.
_FEWEST_PIXELS = 100  # of an instance that counts
_MODES = ("I;16", "I;16B", "I")  # of files with numbers above 255


class _NoInstancesError(ValueError):
    """What makes a file useless, in words that several of them can share."""


def find_cityscapes(
    folders: Sequence[str], parts: Sequence[str], *, option: str, ending: str
) -> list[tuple[str, AnyPath, AnyPath]]:
    """Find images and their annotations.

    Args:
        folders: in which leftImg8bit and gtFine lie.
        parts: such as train.
        option: that gives the parts, for errors.
        ending: of the annotations' names, such as gtFine_labelIds.png.

    Returns:
        for each image its name within the set, its file, and that of its annotation, which may not be there.

    Raises:
        ValueError: a part is not there, or in two places.
    """
    found: list[tuple[str, AnyPath, AnyPath]] = []
    for part in parts:
        places = [root for root in map(open_benchmark, folders) if (root / "leftImg8bit" / part).is_dir()]
        if len(places) != 1:
            raise ValueError(
                f"{option} {part}: there must be one leftImg8bit/{part} in {', '.join(folders)}, and there are "
                f"{len(places)} (docs/transfer.md says where to get it)"
            )
        [place] = places
        there = sorted((place / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        if not there:
            raise ValueError(
                f"{option} {part}: {place}/leftImg8bit/{part} has no */*_leftImg8bit.png: unpack it there "
                "(docs/transfer.md says where to get it), or name another part"
            )
        for image in there:
            name = image.name.removesuffix("_leftImg8bit.png")
            found.append((f"{part}/{name}", image, place / "gtFine" / part / image.parent.name / f"{name}_{ending}"))
    return found


def read_cityscapes(folders: Sequence[str], parts: Sequence[str], *, option: str) -> DetectionSet:
    """Read the instances of images. Groups, whose objects are not told apart, are for the test alone.

    Args:
        folders: in which leftImg8bit and gtFine lie.
        parts: such as train.
        option: that gives the parts, for errors.

    Raises:
        ValueError: a part is not there.
    """
    found = find_cityscapes(folders, parts, option=option, ending="gtFine_instanceIds.png")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda each: _read_image(*each), found))
    return DetectionSet(
        where=", ".join(f"{folder} {part}" for folder in folders for part in parts),
        rules="cityscapes",
        class_names=tuple(_CLASSES),
        images=[image for image in images if isinstance(image, AnnotatedImage)],
        malformed=[image for image in images if isinstance(image, Malformed)],
    )


def _read_image(key: str, path: AnyPath, instances: AnyPath) -> AnnotatedImage | Malformed:
    size = size_as_shown(path)
    if isinstance(size, str):
        return Malformed(key=key, reason=size)
    try:
        data = instances.read_bytes()
        numbers = _numbers(data)
    except FileNotFoundError:
        return Malformed(key=key, reason="has no file of instances")
    except _NoInstancesError as error:
        return Malformed(key=key, reason=str(error))
    if numbers.shape != size[::-1]:
        return Malformed(key=key, reason="is of another size than its file of instances")
    objects = [each for each in _objects(numbers) if not each.is_group]
    digest = running_digest()
    digest.update(data)
    return AnnotatedImage(
        path=path,
        key=key,
        height=numbers.shape[0],
        width=numbers.shape[1],
        boxes=np.array([each.box for each in objects], dtype=np.float32).reshape(-1, 4),
        classes=np.array([each.label for each in objects], dtype=np.int64),
        is_difficult=np.array([each.area < _FEWEST_PIXELS for each in objects], dtype=np.bool_),
        outlines=[each.runs for each in objects],
        digest=digest.hexdigest(),
    )


def _numbers(data: bytes) -> npt.NDArray[np.int32]:
    """Decode a file of instances, (H, W). Raises _NoInstancesError: it is something else."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _MODES:
                raise _NoInstancesError(
                    f"has a file of instances in mode {image.mode}, where their numbers have 16 bits"
                )
            # Column by column, as masks are encoded: of rows, each mask would be turned.
            numbers = np.asarray(image).astype(np.int32, order="F")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise _NoInstancesError("has a file of instances that is no image") from None
    classes = np.where(numbers < _FIRST_INSTANCE, numbers, numbers // _FIRST_INSTANCE)
    if classes.min() < 0 or classes.max() > _LAST_CLASS:
        raise _NoInstancesError("has pixels of an unknown class")
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An instance, or a group of them."""

    label: int
    """Class, from 0."""
    is_group: bool
    area: int
    """In pixels."""
    box: tuple[int, int, int, int]
    runs: Mapping[str, Any]
    """COCO's run lengths."""


def _objects(numbers: npt.NDArray[np.int32]) -> list[_Object]:
    labels = {number: label for label, number in enumerate(_CLASSES.values())}
    found: list[_Object] = []
    for number in np.unique(numbers).tolist():
        is_group = number < _FIRST_INSTANCE
        label = labels.get(number if is_group else number // _FIRST_INSTANCE)
        if label is None:
            continue
        mask = numbers == number
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        area = int(mask.sum())
        found.append(_Object(label=label, is_group=is_group, area=area, box=box, runs=_runs(mask)))
    return found


def _runs(mask: npt.NDArray[np.bool_]) -> Mapping[str, Any]:
    [runs] = encoded_masks(mask[None].astype(np.uint8))
    counts = runs["counts"]
    return {"size": list(mask.shape), "counts": counts if isinstance(counts, str) else counts.decode()}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Overlaps:
    """What was found of a class in an image, beside what is there of it. D detections, N objects."""

    scores: npt.NDArray[np.float64]
    """(D,)"""
    shares: npt.NDArray[np.float64]
    """(D, N) intersection over union with each object."""
    ignored: npt.NDArray[np.float64]
    """(D,) share of the detection that is void, or of objects that do not count."""
    counts: npt.NDArray[np.bool_]
    """(N,) whether an object counts: it is not a group, and large enough."""


def cityscapes_precision(found: Detections, truth: DetectionSet) -> dict[str, list[ClassPrecision]]:
    """Return the average precisions of the masks of each class of which the set has instances that count.

    The rules are those of evaluation/evalInstanceLevelSemanticLabeling.py of mcordts/cityscapesScripts, which writes a
    file for each mask and compares all pixels of each with those of each instance; here run lengths are compared.

    Args:
        found: with masks.
        truth: as `read_cityscapes` gives it.
    """
    assert found.masks is not None
    by_image: list[list[int]] = [[] for _ in truth.images]
    for row, image in enumerate(found.image.tolist()):
        by_image[image].append(row)
    of_classes: list[list[_Overlaps]] = [[] for _ in _CLASSES]
    with ThreadPoolExecutor() as pool:
        rows = [found.chosen(np.array(each, dtype=np.int64)) for each in by_image]
        for of_image in pool.map(_overlaps, truth.images, rows):
            for label, overlaps in of_image.items():
                of_classes[label].append(overlaps)
    precisions: list[ClassPrecision] = []
    for name, images in zip(_CLASSES, of_classes, strict=True):
        num_objects = sum(int(each.counts.sum()) for each in images)
        if num_objects:
            at = tuple(_precision_at(threshold, images) for threshold in OVERLAPS)
            precisions.append(ClassPrecision(name=name, num_objects=num_objects, at=at))
    return {"mask": precisions}


def _overlaps(image: AnnotatedImage, found: Detections) -> dict[int, _Overlaps]:
    """Return, for each class that is in the image or was found in it, how detections and objects overlap."""
    numbers = _numbers(_instances_of(image).read_bytes())
    objects, void = _objects(numbers), _runs(np.isin(numbers, _VOID))
    measure: Any = import_module("faster_coco_eval.core.mask")
    assert found.masks is not None
    areas = np.array([measure.area(each) for each in found.masks], dtype=np.float64).reshape(-1)
    overlaps: dict[int, _Overlaps] = {}
    for label in range(len(_CLASSES)):
        there = [each for each in objects if each.label == label]
        rows = np.flatnonzero((found.classes == label) & (areas > 0)).tolist()
        if not there and not rows:
            continue
        sizes = np.array([each.area for each in there], dtype=np.float64)
        is_group = np.array([each.is_group for each in there], dtype=np.bool_)
        shared = _shared([found.masks[row] for row in rows], [*(each.runs for each in there), void], areas[rows])
        own, of_void = shared[:, :-1], shared[:, -1]
        # A small group counts twice, as in the benchmark.
        ignored = of_void + own @ is_group + own @ (sizes < _FEWEST_PIXELS)
        overlaps[label] = _Overlaps(
            scores=found.scores[rows].astype(np.float64),
            shares=own / (sizes + areas[rows, None] - own),
            ignored=ignored / areas[rows],
            counts=~is_group & (sizes >= _FEWEST_PIXELS),
        )
    return overlaps


def _instances_of(image: AnnotatedImage) -> AnyPath:
    root, part, town = image.path.parents[3], image.path.parents[1].name, image.path.parent.name
    name = image.path.name.replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
    return root / "gtFine" / part / town / name


def _shared(
    found: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], areas: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the pixels that masks share: (D, N)."""
    if not found:
        return np.empty((0, len(there)))
    measure: Any = import_module("faster_coco_eval.core.mask")
    # Of a crowd, the share of the detection is measured.
    shares = measure.iou([dict(each) for each in found], [dict(each) for each in there], [1] * len(there))
    return np.rint(np.asarray(shares) * areas[:, None])


def _precision_at(threshold: float, images: Sequence[_Overlaps]) -> float:
    """Return a class's average precision where a larger overlap counts as found."""
    right: list[float] = []
    wrong: list[float] = []
    num_missed = 0
    for each in images:
        hits = each.shares > threshold
        for scores in (each.scores[hit] for hit in hits[:, each.counts].T):
            num_missed += not len(scores)
            # Of several detections of an object the one with the highest score is right, the others are wrong.
            best_last = np.sort(scores).tolist()
            right += best_last[-1:]
            wrong += best_last[:-1]
        wrong += each.scores[~hits.any(axis=1) & (each.ignored <= threshold)].tolist()
    return step_precision(np.array(right), np.array(wrong), num_missed=num_missed)


def step_precision(right: npt.NDArray[np.float64], wrong: npt.NDArray[np.float64], *, num_missed: int) -> float:
    """Return average precision as Cityscapes defines it: the trapezoids under precision over recall at each score.

    Args:
        right: scores of the detections that are right.
        wrong: scores of those that are wrong.
        num_missed: objects that no detection is right of.
    """
    if not len(right):
        return 0.0
    scores = np.unique(np.concatenate([right, wrong]))  # Rising: the lowest one has all detections.
    num_right = len(right) - np.searchsorted(np.sort(right), scores)
    num_wrong = len(wrong) - np.searchsorted(np.sort(wrong), scores)
    precision = num_right / (num_right + num_wrong)
    recall = num_right / (len(right) + num_missed)
    # The curve goes on to recall 0 with its last precision.
    precision, recall = np.append(precision, precision[-1]), np.append(recall, 0.0)
    sides = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (sides[:-2] - sides[2:]) / 2)
