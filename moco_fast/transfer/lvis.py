"""Layout of LVIS, read as it is, and its federated measure of boxes and masks.

lvis_v0.5_train.json, lvis_v0.5_val.json     images, categories, boxes and outlines; or in `annotations`
train2017/000000000009.jpg, val2017/...      images of COCO, each in one of the two
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from moco_fast.transfer.coco import measured_objects, read_objects, result_rows
from moco_fast.transfer.metrics import OVERLAPS, ClassPrecision, Detections
from moco_fast.transfer.sets import DetectionSet
from shards.sets.benchmark import AnyPath, open_benchmark

__all__ = ["lvis_precision", "read_lvis", "refuse_unlisted"]

_FOLDERS = ("train2017", "val2017")
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_MOST_PER_IMAGE = 300
_ALL_SIZES = [0, 1e10]
# What is known of each image's classes, and what would be wrong without it.
_LISTS = {
    "neg_category_ids": "what is wrongly found there would not count, and its figures would be too high",
    "not_exhaustive_category_ids": "objects that are not marked would count as wrong, and its figures would be too low",
}


def read_lvis(folders: Sequence[str], parts: Sequence[str], *, option: str) -> DetectionSet:
    """Read a part of LVIS, of version 0.5 or 1.

    Args:
        folders: where the file of the part and the images lie, together or apart.
        parts: one, such as lvis_v0.5_train.
        option: that gives the part, for errors.

    Raises:
        ValueError: the part is not there, or its file is not LVIS's.
    """
    if len(parts) != 1:
        raise ValueError(f"LVIS has one part to train on and one to test on, not {option} {' '.join(parts)}")
    [part] = parts
    roots = [open_benchmark(folder) for folder in folders]
    places = [root / inner / f"{part}.json" for root in roots for inner in ("", "annotations")]
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        raise ValueError(
            f"{option} {part}: there must be one {part}.json in {', '.join(folders)} or in annotations there, and "
            f"there are {len(found)} (docs/transfer.md says where to get it)"
        )
    [path] = found
    data = read_objects(path, lambda told: _place(told, roots), where=str(path))
    unknown = [name for name, each in zip(data.class_names, data.groups, strict=True) if each not in _FREQUENCIES]
    if unknown:
        raise ValueError(
            f"{path} is not LVIS's: the frequency of its category {unknown[0]} is not r, c or f; use a preset of COCO "
            "for sets without frequencies"
        )
    return replace(data, rules="lvis", groups=tuple(_FREQUENCIES[each] for each in data.groups))


def _place(told: Mapping[str, Any], roots: Sequence[AnyPath]) -> tuple[str, AnyPath]:
    """Return the name and the file of an image. Raises KeyError: neither name nor address are told."""
    address = PurePosixPath(told.get("coco_url", ""))
    name = PurePosixPath(told.get("file_name") or told["coco_url"])
    # Version 0.5 has the names of COCO's 2014 release: COCO_val2014_000000001268.jpg.
    own = name.name.rpartition("_")[2] if name.name.startswith("COCO_") else name.name
    inner = dict.fromkeys((address.parent.name, name.parent.name, *_FOLDERS))
    paths = [root / each / own for each in inner for root in roots]
    path = next((each for each in paths if each.is_file()), paths[0])
    return f"{path.parent.name}/{own}", path


def refuse_unlisted(truth: DetectionSet) -> None:
    """Refuse a test set that does not say which classes can be counted in which image.

    Raises:
        ValueError: an image is without one of the lists, or has something else in it than numbers.
    """
    _with_lists(truth)


def _with_lists(truth: DetectionSet) -> list[dict[str, Any]]:
    """Return what the file says of its images, with numbers where some tools write text. Raises as its caller."""
    assert truth.annotations is not None
    images: list[dict[str, Any]] = []
    for told in json.loads(truth.annotations.read_bytes())["images"]:
        lists: dict[str, list[int]] = {}
        for name, what in _LISTS.items():
            try:
                lists[name] = [int(category) for category in told[name]]
            except (KeyError, TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{truth.annotations} has no list {name} of its image {told['id']}, so {what}: take the file as "
                    "LVIS publishes it, or a preset of COCO, which counts every class in every image"
                ) from None
        images.append(told | lists | {"id": int(told["id"])})
    return images


def lvis_precision(found: Detections, truth: DetectionSet) -> dict[str, list[ClassPrecision]]:
    """Return the average precisions of each class of which the set has objects, of boxes and of masks.

    The rules are those of lvis/eval.py and lvis/results.py of lvis-dataset/lvis-api: the 300 best detections of an
    image count. In an image that is not known to have objects of a class, or to have none, that class is not looked
    at; where not all of its objects are marked, a detection that is none of those is no error.

    Args:
        found: with masks, if these are to be measured.
        truth: as `read_lvis` gives it; the images that it left out do not count.
    """
    assert truth.annotations is not None
    objects = measured_objects(truth, masks=found.masks is not None)
    known = {image.image_id for image in truth.images}
    told = [each for each in _with_lists(truth) if each["id"] in known]
    looked_at: dict[int, set[int]] = defaultdict(set)
    for each in objects:
        looked_at[each["category_id"]].add(each["image_id"])
    counts = Counter(each["category_id"] for each in objects if not each["iscrowd"])
    for each in told:
        for category in each["neg_category_ids"]:
            looked_at[category].add(each["id"])
    package: Any = import_module("faster_coco_eval")
    letters = {word: letter for letter, word in _FREQUENCIES.items()}
    official = package.COCO(
        {
            "images": told,
            "categories": [
                {"id": number, "name": name, "frequency": letters[group]}
                for number, name, group in zip(truth.category_ids, truth.class_names, truth.groups, strict=True)
            ],
            "annotations": objects,
        }
    )
    counted = _counted(found, truth, looked_at)
    kinds = {"box": "bbox"} if found.masks is None else {"box": "bbox", "mask": "segm"}
    at = {kind: _of_kind(counted, truth, official, looked_at, name) for kind, name in kinds.items()}
    return {
        kind: [
            ClassPrecision(name=name, num_objects=counts[category], at=of_kind[category], group=group)
            for name, category, group in zip(truth.class_names, truth.category_ids, truth.groups, strict=True)
            if counts[category]
        ]
        for kind, of_kind in at.items()
    }


def _counted(found: Detections, truth: DetectionSet, looked_at: Mapping[int, set[int]]) -> Detections:
    """Return the detections that count: of the best of an image, those of classes that are looked at there.

    Most others are in images where their class is not looked at. The measure would drop them too, one by one.
    """
    order = np.lexsort((-found.scores, found.image))
    image = found.image[order]
    place = np.arange(len(image)) - np.searchsorted(image, image)
    best = order[place < _MOST_PER_IMAGE]
    numbers = {image.image_id: number for number, image in enumerate(truth.images)}
    num_classes = len(truth.class_names)
    pairs = [
        numbers[image_id] * num_classes + label
        for label, category in enumerate(truth.category_ids)
        for image_id in looked_at[category]
    ]
    return found.chosen(np.sort(best[np.isin(found.image[best] * num_classes + found.classes[best], pairs)]))


def _of_kind(
    found: Detections, truth: DetectionSet, official: Any, looked_at: Mapping[int, set[int]], kind: str
) -> dict[int, tuple[float, ...]]:
    """Return the precisions of each category at each of `OVERLAPS`."""
    at = {category: (0.0,) * len(OVERLAPS) for category in truth.category_ids}
    if not len(found):
        return at
    package: Any = import_module("faster_coco_eval")
    measure = package.COCOeval_faster(
        official, official.loadRes(result_rows(found, truth, kind)), kind, lvis_style=True
    )
    measure.params.maxDets = [_MOST_PER_IMAGE]
    measure.params.areaRng, measure.params.areaRngLbl = [_ALL_SIZES], ["all"]
    for category in {truth.category_ids[number] for number in np.unique(found.classes).tolist()}:
        # Category by category: version 1 has 24 million pairs of images and categories, and few of them are looked at.
        measure.params.imgIds, measure.params.catIds = sorted(looked_at[category]), [category]
        measure.evaluate()
        measure.accumulate()
        # Overlaps, recalls, classes, sizes, numbers of detections.
        precision: npt.NDArray[np.float64] = np.asarray(measure.eval["precision"])[:, :, 0, 0, 0]
        at[category] = tuple(precision.mean(axis=1).tolist())
    return at
