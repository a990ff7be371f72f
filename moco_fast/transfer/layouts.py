"""Layouts of data by name: how each is read, and how what is found in it is measured. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from moco_fast.transfer.metrics import ClassPrecision, Detections, voc_precision
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import DetectionSet

_SHARES = 2  # Where left and top, width and height are shares, right and bottom are at most this.

__all__ = ["learned", "measured", "read_sets", "refuse_unmarked", "without_masks"]


def read_sets(
    folders: Sequence[str], preset: DetectPreset, *, class_names: tuple[str, ...] | None
) -> tuple[DetectionSet, DetectionSet]:
    """Read what a preset trains and tests on.

    Args:
        folders: where the data lies.
        preset: with its layout and parts.
        class_names: None: those of the layout or of the training set.

    Raises:
        ValueError: a part is not there, the sets do not fit, or what reads them is not installed.
    """
    if preset.layout != "voc":
        from moco_fast.transfer.cityscapes import read_cityscapes
        from moco_fast.transfer.coco import needs_coco, read_coco
        from moco_fast.transfer.lvis import read_lvis, refuse_unlisted

        needs_coco()
        if class_names is not None:
            raise ValueError(f"--classes means nothing for {preset.layout}, which names them itself: leave it out")
        how = {
            "outlines": preset.masks,
            "keypoints": preset.keypoints,
            "pairs": preset.keypoint_pairs,
            "sigmas": preset.keypoint_sigmas,
        }
        read = {"coco": partial(read_coco, **how), "lvis": read_lvis, "cityscapes": read_cityscapes}[preset.layout]
        train = read(folders, preset.train, option="--train")
        test = read(folders, preset.test, option="--test")
        if preset.layout == "lvis":
            refuse_unlisted(test)
        if train.class_names != test.class_names:
            raise ValueError(f"{train.where} and {test.where} have other categories: they must be the same")
        if train.keypoints != test.keypoints:
            raise ValueError(f"{train.where} and {test.where} have other keypoints: they must be the same")
        return train, test
    from moco_fast.transfer.voc import find_parts, read_voc

    if class_names is not None and len(set(class_names)) < len(class_names):
        raise ValueError(f"--classes {' '.join(class_names)}: one is there twice; give each once")
    train = read_voc(find_parts(folders, preset.train, option="--train"), class_names=class_names)
    test_parts = find_parts(folders, preset.test, option="--test")
    return train, read_voc(test_parts, class_names=train.class_names)


def without_masks(
    preset: DetectPreset, train: DetectionSet, test: DetectionSet, *, asked: bool
) -> tuple[DetectPreset, DetectionSet, DetectionSet, list[str]]:
    """Leave masks out where a set has no outline, with a line that says so, or where they are not wanted.

    Args:
        preset: says whether they are wanted.
        train: set that is trained on.
        test: set that is tested on.
        asked: whether the user asked for masks.

    Raises:
        ValueError: a user asked for masks that cannot be.
    """
    # Why a set has no image at all is said by what left them out.
    bare = [each.where for each in (train, test) if each.images and not each.has_outlines]
    if preset.masks and not bare:
        return preset, train, test, []
    if asked:
        raise ValueError(f"--masks True, but no object of {' and '.join(bare)} has an outline: leave it out")
    note = f"no object of {' and '.join(bare)} has an outline: boxes alone are trained and tested, without masks"
    train, test = (
        replace(each, images=[replace(image, outlines=None) for image in each.images]) for each in (train, test)
    )
    return replace(preset, masks=False), train, test, [note] if preset.masks else []


def learned(data: DetectionSet, preset: DetectPreset) -> DetectionSet:
    """Return a set without the images that training does not look at: those with too little marked in them."""
    boxed = data.with_boxes
    return boxed.with_keypoints(preset.min_keypoints) if preset.keypoints else boxed


def refuse_unmarked(train: DetectionSet, test: DetectionSet, preset: DetectPreset) -> None:
    """Refuse sets of which nothing could be learned or measured, before the training. Raises ValueError."""
    if not train.with_boxes.images:
        raise ValueError(f"no image of {train.where} has a box, so there is nothing to learn: name another --train")
    for data in (train, test):
        if max((float(image.boxes.max(initial=0)) for image in data.images), default=0) <= _SHARES and any(
            len(image.boxes) for image in data.images
        ):
            raise ValueError(
                f"all boxes of {data.where} lie within the first {_SHARES} pixels of their images, as shares of width "
                "and height would: multiply them by these, since boxes are in pixels"
            )
    if not learned(train, preset).images:
        raise ValueError(
            f"no image of {train.where} has {preset.min_keypoints} or more marked keypoints, so there is nothing to "
            "learn: name another --train, or give a smaller --min-keypoints"
        )
    if preset.keypoints and not test.with_keypoints(1).images:
        raise ValueError(f"no object of {test.where} has a marked keypoint: name another --test")
    if all(image.is_difficult.all() for image in test.images):
        raise ValueError(
            f"no image of {test.where} has an object that counts, so there is nothing to measure (difficult ones and "
            "crowds do not count): name another --test"
        )


def measured(found: Detections, truth: DetectionSet) -> Mapping[str, list[ClassPrecision]]:
    """Return average precisions of each class of what the set's rules measure: boxes, masks and keypoints, or some."""
    if truth.rules == "voc":
        return {"box": voc_precision(found, truth)}
    from moco_fast.transfer.cityscapes import cityscapes_precision
    from moco_fast.transfer.coco import coco_precision
    from moco_fast.transfer.lvis import lvis_precision

    measure = {"coco": coco_precision, "lvis": lvis_precision, "cityscapes": cityscapes_precision}[truth.rules]
    return measure(found, truth)
