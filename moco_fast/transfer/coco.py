"""Layout of COCO, read as it is, and its measure of boxes and masks.

annotations/instances_train2017.json     images, categories, boxes and outlines
train2017/000000000009.jpg
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.transfer.metrics import OVERLAPS, ClassPrecision, Detections
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, Malformed, Outline

__all__ = ["coco_precision", "drawn_masks", "encoded_masks", "needs_coco", "read_coco"]

_NUM_POINTS = 6  # numbers in the smallest polygon


def needs_coco() -> None:
    """Refuse to go on without what measures COCO. Raises ValueError: with what is to be installed."""
    if find_spec("faster_coco_eval") is None:
        raise ValueError("COCO is measured by faster-coco-eval: pip install 'moco-fast[transfer]'")


class _Unusable(ValueError):  # noqa: N818 - a reason, in words that several can share
    pass


def read_coco(folders: Sequence[str], parts: Sequence[str], *, option: str) -> DetectionSet:
    """Read a part of COCO, or of a set in its layout.

    Crowds are for the test alone, which reads the file itself.

    Args:
        folders: one, in which `annotations` and the folder of the images are.
        parts: one, such as train2017.
        option: that gives the part, for errors.

    Raises:
        ValueError: the part is not there, or its file is not COCO's.
    """
    if len(folders) != 1 or len(parts) != 1:
        raise ValueError(
            f"COCO is one folder with one part to train on and one to test on, not {len(folders)} folders and {option} "
            f"{' '.join(parts)}"
        )
    folder, part = Path(folders[0]), parts[0]
    path = folder / "annotations" / f"instances_{part}.json"
    if not path.is_file() or not (folder / part).is_dir():
        raise ValueError(
            f"{option} {part}: {path} or the folder {folder / part} is not there: unpack it there (docs/transfer.md "
            "says where to get it), or name another part"
        )
    try:
        told = json.loads(path.read_bytes())
        categories = sorted((int(each["id"]), str(each["name"])) for each in told["categories"])
        images, objects = list(told["images"]), list(told["annotations"])
        by_image: dict[int, list[Any]] = defaultdict(list)
        for each in objects:
            by_image[int(each["image_id"])].append(each)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of COCO's instances ({error!r})") from None
    names = {entry.name for entry in os.scandir(folder / part)}
    numbers = {category: number for number, (category, _) in enumerate(categories)}
    kept: list[AnnotatedImage] = []
    malformed: list[Malformed] = []
    unusable: list[Malformed] = []
    for image in images:
        if image["file_name"] not in names:
            malformed.append(Malformed(key=image["file_name"], reason="has no image"))
        else:
            kept.append(_image(folder / part, image, by_image[int(image["id"])], numbers, unusable))
    return DetectionSet(
        where=str(folder / part),
        class_names=tuple(name for _, name in categories),
        images=kept,
        malformed=malformed,
        malformed_objects=unusable,
        annotations=path,
        category_ids=tuple(category for category, _ in categories),
    )


def _image(
    folder: Path,
    told: Mapping[str, Any],
    objects: Sequence[Mapping[str, Any]],
    numbers: Mapping[int, int],
    unusable: list[Malformed],
) -> AnnotatedImage:
    height, width = int(told["height"]), int(told["width"])
    boxes: list[tuple[float, ...]] = []
    classes: list[int] = []
    outlines: list[Outline] = []
    for each in objects:
        if each.get("iscrowd"):
            continue
        try:
            found = _box(each, width, height), _class(each, numbers), _outline(each)
        except _Unusable as error:
            unusable.append(Malformed(key=str(each.get("id")), reason=str(error)))
            continue
        for values, value in zip((boxes, classes, outlines), found, strict=True):
            values.append(value)  # pyright: ignore[reportArgumentType] - each its own
    return AnnotatedImage(
        path=folder / told["file_name"],
        key=str(told["file_name"]),
        height=height,
        width=width,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.array(classes, dtype=np.int64),
        is_difficult=np.zeros(len(boxes), dtype=np.bool_),
        outlines=outlines,
        image_id=int(told["id"]),
    )


def _box(told: Mapping[str, Any], width: int, height: int) -> tuple[float, ...]:
    try:
        x, y, wide, high = (float(value) for value in told["bbox"])
    except (KeyError, TypeError, ValueError):
        raise _Unusable("has a box without four numbers") from None
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + wide, float(width)), min(y + high, float(height))
    if not (left < right and top < bottom):
        raise _Unusable("has a box without an area in the image")
    return (left, top, right, bottom)


def _class(told: Mapping[str, Any], numbers: Mapping[int, int]) -> int:
    if told.get("category_id") not in numbers:
        raise _Unusable("is of an unknown category")
    return numbers[told["category_id"]]


def _outline(told: Mapping[str, Any]) -> Outline:
    outline = told.get("segmentation")
    if isinstance(outline, dict):
        return outline
    polygons = [each for each in outline or () if len(each) >= _NUM_POINTS and len(each) % 2 == 0]
    if not polygons:
        raise _Unusable("has no outline")
    return [np.array(each, dtype=np.float32).reshape(-1, 2) for each in polygons]


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


def coco_precision(found: Detections, truth: DetectionSet) -> dict[str, list[ClassPrecision]]:
    """Return the average precisions of each class of which the set has objects, of boxes and of masks.

    All sizes, at most 100 detections per image, as COCO's own code: 101 recalls, and crowds that hide errors.

    Args:
        found: with masks, if these are to be measured.
        truth: as `read_coco` gives it; the images that it left out do not count.
    """
    package: Any = import_module("faster_coco_eval")
    assert truth.annotations is not None
    official = package.COCO(str(truth.annotations))
    ids = {image.image_id for image in truth.images}
    counts = Counter(
        each["category_id"] for each in official.anns.values() if each["image_id"] in ids and not each.get("iscrowd")
    )
    kinds = {"box": "bbox"} if found.masks is None else {"box": "bbox", "mask": "segm"}
    return {kind: _of_kind(found, truth, official, counts, name) for kind, name in kinds.items()}


def _of_kind(
    found: Detections, truth: DetectionSet, official: Any, counts: Mapping[int, int], kind: str
) -> list[ClassPrecision]:
    package: Any = import_module("faster_coco_eval")
    rows = _rows(found, truth, kind)
    at: dict[int, tuple[float, ...]] = {}
    if rows:
        measure = package.COCOeval_faster(official, official.loadRes(rows), kind)
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


def _rows(found: Detections, truth: DetectionSet, kind: str) -> list[dict[str, Any]]:
    """Return detections in COCO's form, with one of box and mask: a size is measured of what there is."""
    sides = found.boxes.astype(np.float64)
    sides[:, 2:] -= sides[:, :2]
    rows: list[dict[str, Any]] = []
    for number in range(len(found)):
        where = {"bbox": sides[number].tolist()}
        if kind == "segm":
            assert found.masks is not None
            where = {"segmentation": found.masks[number]}
        rows.append(
            {
                "image_id": truth.images[int(found.image[number])].image_id,
                "category_id": truth.category_ids[int(found.classes[number])],
                "score": float(found.scores[number]),
                **where,
            }
        )
    return rows
