"""Layouts of data by name: how each is read, and how what is found in it is measured. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moco_fast.transfer.metrics import ClassPrecision, Detections, voc_precision
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import DetectionSet

__all__ = ["measured", "read_sets", "refuse_unmarked"]


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
        from moco_fast.transfer.lvis import read_lvis

        needs_coco()
        if class_names is not None:
            raise ValueError(f"--classes means nothing for {preset.layout}, which names them itself: leave it out")
        read = {"coco": read_coco, "lvis": read_lvis, "cityscapes": read_cityscapes}[preset.layout]
        train = read(folders, preset.train, option="--train")
        test = read(folders, preset.test, option="--test")
        if train.class_names != test.class_names:
            raise ValueError(f"{train.where} and {test.where} have other categories: they must be the same")
        return (train, test) if preset.masks else (_without_outlines(train), _without_outlines(test))
    from moco_fast.transfer.voc import find_parts, read_voc

    if class_names is not None and len(set(class_names)) < len(class_names):
        raise ValueError(f"--classes {' '.join(class_names)}: one is there twice; give each once")
    train = read_voc(find_parts(folders, preset.train, option="--train"), class_names=class_names)
    test_parts = find_parts(folders, preset.test, option="--test")
    return train, read_voc(test_parts, class_names=train.class_names)


def refuse_unmarked(train: DetectionSet, test: DetectionSet) -> None:
    """Refuse sets of which nothing could be learned or measured, before the training. Raises ValueError."""
    if not train.with_boxes.images:
        raise ValueError(f"no image of {train.where} has a box, so there is nothing to learn: name another --train")
    if all(image.is_difficult.all() for image in test.images):
        raise ValueError(
            f"no image of {test.where} has an object that counts, so there is nothing to measure (difficult ones and "
            "crowds do not count): name another --test"
        )


def _without_outlines(data: DetectionSet) -> DetectionSet:
    return replace(data, images=[replace(image, outlines=None) for image in data.images])


def measured(found: Detections, truth: DetectionSet) -> Mapping[str, list[ClassPrecision]]:
    """Return average precisions of each class of what the set's rules measure: boxes, masks, or both."""
    if truth.rules == "voc":
        return {"box": voc_precision(found, truth)}
    from moco_fast.transfer.cityscapes import cityscapes_precision
    from moco_fast.transfer.coco import coco_precision
    from moco_fast.transfer.lvis import lvis_precision

    measure = {"coco": coco_precision, "lvis": lvis_precision, "cityscapes": cityscapes_precision}[truth.rules]
    return measure(found, truth)
