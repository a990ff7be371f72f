"""Layout of COCO, read as it is, and its measure of boxes, masks and keypoints.

annotations/instances_train2017.json           images, categories, boxes and outlines
annotations/person_keypoints_train2017.json    the same of people alone, with keypoints
train2017/000000000009.jpg
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.transfer.keypoints import Keypoints, keypoints_of
from moco_fast.transfer.metrics import OVERLAPS, ClassPrecision, Detections
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, Malformed, Outline, size_as_shown
from shards.ground.units import counted
from shards.sets.benchmark import AnyPath, open_benchmark

__all__ = [
    "coco_precision",
    "decoded_mask",
    "drawn_masks",
    "encoded_masks",
    "measured_objects",
    "needs_coco",
    "read_coco",
    "read_objects",
    "result_rows",
]

_NO_NUMBERS = (TypeError, ValueError, OverflowError)  # of whatever JSON has instead
_NO_KEYPOINTS = np.empty((0, 3), dtype=np.float32)
_NUM_POINTS = 6  # numbers in the smallest polygon
_HALF_PIXEL = 0.5  # Keypoints of files are numbers of pixels, boxes and outlines places between them.
# What stands in for an object's area where a file has none: of its box, as xtcocotools and faster-coco-eval have it.
_SHARE_OF_BOX = 0.53


def needs_coco() -> None:
    """Refuse to go on without what measures COCO. Raises ValueError: with what is to be installed."""
    if find_spec("faster_coco_eval") is None:
        raise ValueError("COCO is measured by faster-coco-eval: pip install 'moco-fast[transfer]'")


class _Unusable(ValueError):  # noqa: N818 - a reason, in words that several can share
    pass


class _NoOutlineError(_Unusable):
    pass


def read_coco(
    folders: Sequence[str],
    parts: Sequence[str],
    *,
    option: str,
    outlines: bool = True,
    keypoints: bool = False,
    pairs: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
) -> DetectionSet:
    """Read a part of COCO, or of a set in its layout.

    Crowds are for the test alone, which reads the file itself. Where no object has an outline, the set has none; where
    some have, those without are left out.

    Args:
        folders: one, in which `annotations` and the folder of the images are.
        parts: one, such as train2017.
        option: that gives the part, for errors.
        outlines: whether they are read.
        keypoints: whether they are read, of a file of keypoints.
        pairs: of keypoints, as of `keypoints_of`.
        sigmas: of keypoints, as of `keypoints_of`.

    Raises:
        ValueError: the part is not there, its file is not COCO's, or its keypoints do not fit.
    """
    if len(folders) != 1 or len(parts) != 1:
        raise ValueError(
            "COCO is one folder with one part to train on and one to test on, not "
            f"{counted(len(folders), 'folder')} and {option} {' '.join(parts)}"
        )
    folder, part = open_benchmark(folders[0]), parts[0]
    kind = "person_keypoints" if keypoints else "instances"
    path = folder / "annotations" / f"{kind}_{part}.json"
    if not path.is_file() or not (folder / part).is_dir():
        raise ValueError(
            f"{option} {part}: {path} or the folder {folder / part} is not there: unpack it there (docs/transfer.md "
            "says where to get it), or name another part"
        )

    def place(told: Mapping[str, Any]) -> tuple[str, AnyPath]:
        return str(told["file_name"]), folder / part / str(told["file_name"])

    named = partial(keypoints_of, where=str(path), pairs=pairs, sigmas=sigmas) if keypoints else None
    return replace(read_objects(path, place, where=str(folder / part), outlines=outlines, keypoints=named), groups=())


def read_objects(
    path: AnyPath,
    place: Callable[[Mapping[str, Any]], tuple[str, AnyPath]],
    *,
    where: str,
    outlines: bool = True,
    keypoints: Callable[[Sequence[Mapping[str, Any]]], Keypoints] | None = None,
) -> DetectionSet:
    """Read a file of objects in COCO's form; the `frequency` of its categories, where it has one, is their group.

    Args:
        path: of the file.
        place: from what the file says of an image to its name and its own file.
        where: the set, for people.
        outlines: whether they are read, if some object has one.
        keypoints: from the file's categories to their keypoints; None: they are not read.

    Raises:
        ValueError: the file is not COCO's.
    """
    data = path.read_bytes()
    try:
        told = json.loads(data)
        categories = sorted(
            (int(each["id"]), str(each["name"]), str(each.get("frequency", ""))) for each in told["categories"]
        )
        images = [_Told.of(each, place) for each in told["images"]]
        by_image: dict[int, list[Any]] = defaultdict(list)
        for each in told["annotations"]:
            by_image[int(each["image_id"])].append(each)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a file of COCO's instances ({error!r})") from None
    _refuse_twice((image.number for image in images), f"{path} has two images with the id")
    _refuse_twice((category for category, *_ in categories), f"{path} has two categories with the id")
    numbers = {category: number for number, (category, *_) in enumerate(categories)}
    details = _Details(
        outlines=outlines and any(map(_has_outline, told["annotations"])),
        keypoints=None if keypoints is None else keypoints(told["categories"]),
    )
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda each: size_as_shown(each.path, each.size), images))
    of_images = list(zip(images, sizes, strict=True))
    unusable: list[Malformed] = []
    return DetectionSet(
        where=where,
        rules="coco",
        class_names=tuple(name for _, name, _ in categories),
        images=[
            _image(image, by_image[image.number], numbers, details, unusable)
            for image, size in of_images
            if not isinstance(size, str)
        ],
        malformed=[Malformed(key=image.name, reason=size) for image, size in of_images if isinstance(size, str)],
        malformed_objects=unusable,
        annotations=path,
        category_ids=tuple(numbers),
        groups=tuple(group for *_, group in categories),
        keypoints=details.keypoints,
    )


@dataclass(frozen=True, kw_only=True)
class _Details:
    """What is read of objects beside boxes and classes."""

    outlines: bool
    keypoints: Keypoints | None


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the file says of an image."""

    number: int
    name: str
    path: AnyPath
    height: int
    width: int

    @classmethod
    def of(cls, told: Mapping[str, Any], place: Callable[[Mapping[str, Any]], tuple[str, AnyPath]]) -> "_Told":
        """Raises ValueError, KeyError, TypeError: something is missing."""
        sides = {side: int(told[side]) for side in ("height", "width")}
        name, path = place(told)
        return cls(number=int(told["id"]), name=name, path=path, **sides)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as Pillow has them."""
        return self.width, self.height


def _refuse_twice(ids: Iterable[int], what: str) -> None:
    twice = [number for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]}, so what is marked in them cannot be told apart: give each its own")


def _image(
    told: _Told,
    objects: Sequence[Mapping[str, Any]],
    numbers: Mapping[int, int],
    details: _Details,
    unusable: list[Malformed],
) -> AnnotatedImage:
    boxes: list[tuple[float, ...]] = []
    classes: list[int] = []
    outlines: list[Outline] = []
    keypoints: list[npt.NDArray[np.float32]] = []
    num_keypoints = len(details.keypoints or ())
    for each in objects:
        if _is_crowd(each):
            continue
        try:
            found = (
                _box(each, told.width, told.height),
                _class(each, numbers),
                _outline(each, (told.height, told.width)) if details.outlines else [],
                _learned_keypoints(each, num_keypoints, told.width, told.height)
                if details.keypoints
                else _NO_KEYPOINTS,
            )
        except _Unusable as error:
            unusable.append(Malformed(key=str(each.get("id")), reason=str(error)))
            continue
        for values, value in zip((boxes, classes, outlines, keypoints), found, strict=True):
            values.append(value)  # pyright: ignore[reportArgumentType] - each its own
    return AnnotatedImage(
        path=told.path,
        key=told.name,
        height=told.height,
        width=told.width,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.array(classes, dtype=np.int64),
        is_difficult=np.zeros(len(boxes), dtype=np.bool_),
        outlines=outlines if details.outlines else None,
        keypoints=np.array(keypoints, np.float32).reshape(-1, num_keypoints, 3) if details.keypoints else None,
        image_id=told.number,
    )


def _box(told: Mapping[str, Any], width: int, height: int) -> tuple[float, ...]:
    x, y, wide, high = _four(told)
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + wide, float(width)), min(y + high, float(height))
    if not (left < right and top < bottom):
        raise _Unusable("has a box without an area in the image")
    return (left, top, right, bottom)


def _four(told: Mapping[str, Any]) -> tuple[float, ...]:
    try:
        x, y, wide, high = (float(value) for value in told["bbox"])
    except (KeyError, *_NO_NUMBERS):
        raise _Unusable("has a box without four numbers") from None
    if not all(map(math.isfinite, (x, y, wide, high))):
        raise _Unusable("has a box without four numbers")
    return (x, y, wide, high)


def _class(told: Mapping[str, Any], numbers: Mapping[int, int]) -> int:
    try:
        return numbers[int(told["category_id"])]
    except (KeyError, *_NO_NUMBERS):
        raise _Unusable("is of an unknown category") from None


def _is_crowd(told: Mapping[str, Any]) -> bool:
    # Some tools write numbers as text, and "0" is true in Python.
    return told.get("iscrowd") not in (None, 0, "0", "")


def _outline(told: Mapping[str, Any], size: tuple[int, int]) -> Outline:
    outline = told.get("segmentation")
    if isinstance(outline, dict):
        _check_runs(outline, size)  # pyright: ignore[reportUnknownArgumentType] - of JSON
        return outline  # pyright: ignore[reportUnknownVariableType] - of JSON
    polygons = [each for each in _polygons(outline) if len(each) >= _NUM_POINTS and len(each) % 2 == 0]
    if not polygons:
        raise _NoOutlineError("has no outline (--masks False does without)")
    return [each.astype(np.float32).reshape(-1, 2) for each in polygons]


def _polygons(outline: Any) -> list[npt.NDArray[np.float64]]:
    """Return each polygon's numbers (2 * corners,), also those of too few."""
    try:
        found = [np.array(each, dtype=np.float64) for each in outline or ()]
    except _NO_NUMBERS:
        raise _Unusable("has an outline that is not lists of numbers") from None
    if not all(each.ndim == 1 and np.isfinite(each).all() for each in found):
        raise _Unusable("has an outline that is not lists of numbers")
    return found


def _has_outline(told: Any) -> bool:
    """Return whether an object has an outline, if only one that cannot be used."""
    if not isinstance(told, Mapping) or _is_crowd(told):  # pyright: ignore[reportUnknownArgumentType] - of JSON
        return False
    try:
        return isinstance(told.get("segmentation"), Mapping) or bool(_outline(told, (0, 0)))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - of JSON
    except _NoOutlineError:
        return False
    except _Unusable:
        return True


def _keypoints(told: Mapping[str, Any], num_keypoints: int) -> npt.NDArray[np.float32]:
    """Return (K, 3) x, y and visibility as a file has them; an object without any has none that is marked."""
    try:
        numbers = np.array(told.get("keypoints") or [0] * 3 * num_keypoints, dtype=np.float32)
    except _NO_NUMBERS:
        raise _Unusable("has keypoints that are not numbers") from None
    if numbers.shape != (3 * num_keypoints,):
        raise _Unusable("has another number of keypoints than its category")
    found = numbers.reshape(num_keypoints, 3)
    if not np.isfinite(found).all():
        raise _Unusable("has keypoints that are not numbers")
    if not np.isin(found[:, 2], (0, 1, 2)).all():
        raise _Unusable("has a keypoint whose visibility is not 0, 1 or 2")
    return found


def _learned_keypoints(told: Mapping[str, Any], num_keypoints: int, width: int, height: int) -> npt.NDArray[np.float32]:
    """Return (K, 3) places in the image; what lies beyond it is not marked, as in detectron2."""
    found = _keypoints(told, num_keypoints)
    found[:, :2] += _HALF_PIXEL
    is_inside = ((found[:, :2] >= 0) & (found[:, :2] <= (width, height))).all(axis=1)
    found[~is_inside | (found[:, 2] == 0)] = 0
    return found


def _check_runs(outline: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Refuse run lengths that are not those of the image: what decodes them would fail in the middle of a training."""
    mask: Any = import_module("faster_coco_eval.core.mask")
    try:
        told = tuple(int(side) for side in outline["size"])
        counts = outline["counts"]
        # Packed ones are decoded, which takes as long as drawing them once.
        total = sum(counts) if isinstance(counts, list) else mask.decode(dict(outline)).size  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] - of JSON
    except Exception:
        raise _Unusable("has run lengths that cannot be read") from None
    if told != size or total != size[0] * size[1]:
        raise _Unusable("has run lengths of another size than its image")


def measured_objects(truth: DetectionSet, *, masks: bool) -> list[dict[str, Any]]:
    """Return what the test counts of a file's objects, crowds too, numbered from 1 as the measure wants them.

    What cannot be learned from for want of an area or an outline counts, as in COCO's own code; what that code cannot
    read does not.
    """
    assert truth.annotations is not None
    num_keypoints = len(truth.keypoints or ())
    images = {image.image_id: image for image in truth.images}
    numbers = {category: number for number, category in enumerate(truth.category_ids)}
    kept: list[dict[str, Any]] = []
    for told in json.loads(truth.annotations.read_bytes())["annotations"]:
        if (image := images.get(int(told["image_id"]))) is None:
            continue
        try:
            category = truth.category_ids[_class(told, numbers)]
            box = _four(told)
            more: dict[str, Any] = {}
            if masks:
                more["segmentation"] = _measured_outline(told, (image.height, image.width))
            if num_keypoints:
                more |= _measured_keypoints(told, num_keypoints, box)
        except _Unusable:
            continue
        kept.append(
            {
                "id": len(kept) + 1,
                "image_id": image.image_id,
                "category_id": category,
                "bbox": list(box),
                # Only averages by size, of which none is stated, and keypoints need it.
                "area": box[2] * box[3],
                "iscrowd": int(_is_crowd(told)),
                **more,
            }
        )
    return kept


def _measured_outline(told: Mapping[str, Any], size: tuple[int, int]) -> Any:
    try:
        _outline(told, size)
    except _NoOutlineError:
        # COCO's own code takes polygons of four numbers, too.
        return [each.tolist() for each in _polygons(told.get("segmentation")) if len(each) == 4]
    outline = told["segmentation"]
    return outline if isinstance(outline, Mapping) else [each.tolist() for each in _polygons(outline)]  # pyright: ignore[reportUnknownVariableType] - of JSON


def _measured_keypoints(told: Mapping[str, Any], num_keypoints: int, box: Sequence[float]) -> dict[str, Any]:
    found = _keypoints(told, num_keypoints)
    try:
        area = float(told.get("area") or 0)
    except _NO_NUMBERS:
        area = 0.0
    return {
        "keypoints": found.ravel().tolist(),
        # An object without a marked keypoint counts neither as found nor as missed.
        "num_keypoints": int((found[:, 2] > 0).sum()),
        "area": area if 0 < area < math.inf else _SHARE_OF_BOX * box[2] * box[3],
    }


def drawn_masks(found: AnnotatedImage, *, height: int, width: int, is_mirrored: bool) -> npt.NDArray[np.uint8]:
    """Draw the objects of an image in another size: (N, height, width), 0 or 1."""
    mask: Any = import_module("faster_coco_eval.core.mask")
    assert found.outlines is not None
    drawn = np.zeros((len(found.outlines), height, width), dtype=np.uint8)
    scale = np.array((width / found.width, height / found.height))
    for number, outline in enumerate(found.outlines):
        if isinstance(outline, Mapping):
            is_packed = isinstance(outline["counts"], str)
            runs = dict(outline) if is_packed else mask.frPyObjects(dict(outline), found.height, found.width)
            whole = Image.fromarray(mask.decode(runs))
            drawn[number] = np.asarray(whole.resize((width, height), Image.Resampling.NEAREST))
            continue
        polygons = [(each.astype(np.float64) * scale).ravel().tolist() for each in outline]
        drawn[number] = mask.decode(mask.merge(mask.frPyObjects(polygons, height, width)))
    return np.ascontiguousarray(drawn[:, :, ::-1]) if is_mirrored else drawn


def encoded_masks(masks: npt.NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Return COCO's run lengths of masks (N, height, width), 0 or 1."""
    mask: Any = import_module("faster_coco_eval.core.mask")
    return list(mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))) if len(masks) else []


def decoded_mask(runs: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Return the mask of one of COCO's run lengths: (height, width), 0 or 1."""
    mask: Any = import_module("faster_coco_eval.core.mask")
    return mask.decode(dict(runs))


def coco_precision(found: Detections, truth: DetectionSet) -> dict[str, list[ClassPrecision]]:
    """Return the average precisions of each class of which the set has objects: of keypoints, boxes and masks.

    All sizes, at most 100 detections per image (keypoints: 20), as COCO's own code: 101 recalls, and crowds that hide
    errors. Keypoints are compared by OKS, with the area that the file gives an object.

    Args:
        found: with masks and keypoints, if these are to be measured.
        truth: as `read_coco` gives it; the images that it left out do not count.
    """
    package: Any = import_module("faster_coco_eval")
    assert truth.annotations is not None
    objects = measured_objects(truth, masks=found.masks is not None)
    official = package.COCO(
        {
            "images": [
                {"id": each.image_id, "height": each.height, "width": each.width, "file_name": each.key}
                for each in truth.images
            ],
            "categories": [
                {"id": number, "name": name} for number, name in zip(truth.category_ids, truth.class_names, strict=True)
            ],
            "annotations": objects,
        }
    )
    kinds = {"box": "bbox"}
    if found.masks is not None:
        kinds |= {"mask": "segm"}
    if found.keypoints is not None:
        kinds = {"keypoint": "keypoints"} | kinds
    return {kind: _of_kind(found, truth, official, _counts(objects, name), name) for kind, name in kinds.items()}


def _counts(objects: Sequence[Mapping[str, Any]], kind: str) -> Counter[int]:
    """Return how many objects of each category can be found or missed."""
    counted = (each for each in objects if not each["iscrowd"] and (kind != "keypoints" or each["num_keypoints"]))
    return Counter(each["category_id"] for each in counted)


def _of_kind(
    found: Detections, truth: DetectionSet, official: Any, counts: Mapping[int, int], kind: str
) -> list[ClassPrecision]:
    package: Any = import_module("faster_coco_eval")
    rows = result_rows(found, truth, kind)
    at: dict[int, tuple[float, ...]] = {}
    if rows:
        sigmas = None if truth.keypoints is None else list(truth.keypoints.sigmas)
        measure = package.COCOeval_faster(official, official.loadRes(rows), kind, kpt_oks_sigmas=sigmas)
        measure.params.imgIds = sorted(image.image_id for image in truth.images)
        measure.params.catIds = list(truth.category_ids)
        measure.evaluate()
        measure.accumulate()
        # Overlaps, recalls, classes, sizes, numbers of detections: all sizes, and 100.
        precision = np.asarray(measure.eval["precision"])[:, :, :, 0, -1]
        at = {
            category: tuple(precision[:, :, number].mean(axis=1).tolist())
            for number, category in enumerate(truth.category_ids)
        }
    nothing = (0.0,) * len(OVERLAPS)
    return [
        ClassPrecision(name=name, num_objects=counts[category], at=at.get(category, nothing))
        for name, category in zip(truth.class_names, truth.category_ids, strict=True)
        if counts.get(category)
    ]


def result_rows(found: Detections, truth: DetectionSet, kind: str) -> list[dict[str, Any]]:
    """Return detections in COCO's form, with one of box, mask and keypoints: a size is measured of what there is."""
    sides = found.boxes.astype(np.float64)
    sides[:, 2:] -= sides[:, :2]
    rows: list[dict[str, Any]] = []
    for number in range(len(found)):
        where = {"bbox": sides[number].tolist()}
        if kind == "segm":
            assert found.masks is not None
            where = {"segmentation": found.masks[number]}
        if kind == "keypoints":
            assert found.keypoints is not None
            places = found.keypoints[number].astype(np.float64) - (_HALF_PIXEL, _HALF_PIXEL, 0)
            where = {"keypoints": places.ravel().tolist()}
        rows.append(
            {
                "image_id": truth.images[int(found.image[number])].image_id,
                "category_id": truth.category_ids[int(found.classes[number])],
                "score": float(found.scores[number]),
                **where,
            }
        )
    return rows
