"""Detection as a transfer task: what is built, trained on and measured."""

from collections.abc import Callable, Sequence
from math import ceil
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import FigureInfo
from moco_fast.transfer.coco import encoded_masks
from moco_fast.transfer.device_decoding import open_decoder
from moco_fast.transfer.galleries import detection_gallery
from moco_fast.transfer.layouts import learned, measured
from moco_fast.transfer.loader import HeldOutImage, HeldOutImages, TrainingImages
from moco_fast.transfer.metrics import OVERLAPS, ClassPrecision, Detections
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import DetectionSet
from moco_fast.transfer.training import Machine, NetworkTrainings, TestOutcome, in_turn

__all__ = ["DetectorTrainings", "find_all", "in_own_pixels", "mean_values", "values"]

_CAPTIONS = {
    "AP50": "Mean over the classes of the average precision where {} overlap by more than 50%.",
    "AP": "Mean over the classes of the average precision of {}, over ten overlaps from 50% to 95%.",
    "AP75": "Mean over the classes of the average precision where {} overlap by more than 75%.",
    "APr": "AP of {} of the rare classes, which few training images have.",
    "APc": "AP of {} of the common classes.",
    "APf": "AP of {} of the frequent classes.",
}
_GROUPS = {"APr": "rare", "APc": "common", "APf": "frequent"}
# As the papers have them: of VOC's three figures AP50 comes first, and those of COCO and LVIS name what they are of.
_FIGURES = {
    "voc": ("AP50", "AP", "AP75"),
    "coco": ("AP", "AP50", "AP75"),
    "lvis": ("AP", "AP50", "AP75", "APr", "APc", "APf"),
    "cityscapes": ("AP", "AP50"),
}
_KINDS = {"box": "boxes", "mask": "masks", "keypoint": "keypoints (OKS)"}


class DetectorTrainings(NetworkTrainings):
    """Trainings of detectors; images without boxes, or keypoints, are not trained on. Arguments as of its base."""

    def __init__(
        self, train: DetectionSet, test: DetectionSet, preset: DetectPreset, machine: Machine, **more: Any
    ) -> None:
        train = learned(train, preset)
        super().__init__(train, test, preset, machine, **more)
        self._learned, self._tested, self._preset = train, test, preset

    def build(self, encoder: Encoder, *, seed: int) -> nn.Module:
        """Build the preset's detector."""
        return build_detector(
            encoder,
            self._preset,
            num_classes=len(self._learned.class_names),
            seed=seed,
            num_keypoints=len(self._learned.keypoints or ()),
        )

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Of the set's keypoints, if the preset has them."""
        return self._learned.keypoints.names if self._preset.keypoints and self._learned.keypoints else ()

    def images(self, encoder: Encoder, *, seed: int) -> TrainingImages:
        """Open this rank's batches of images with boxes."""
        del encoder
        share = self._preset.batch_size // self._machine.world.world_size
        is_wanted = self._machine.decode == "auto"
        return TrainingImages(
            self._learned,
            self._preset,
            seed=seed,
            decoder=open_decoder(self._machine.device, batch_size=share) if is_wanted else None,
            world=self._machine.world,
            threads=self._machine.threads,
            at_most_damaged=self._at_most_damaged,
        )

    def measure(self, network: nn.Module) -> TestOutcome:
        """Find objects in all test images, and measure how well."""
        found, num_untested = find_all(network, self._tested, self._preset, self._machine, stop=self.leave)
        # By one rank: each of the others would read all of COCO's annotations once more.
        is_first = self._machine.world.rank == 0
        with distributed.leaving_together():
            own = measured(found, self._tested) if is_first else {}
        precisions = distributed.tell_all(own)
        figures = {
            self._name(kind, name): value
            for kind, of_kind in precisions.items()
            for name, value in mean_values(of_kind, _FIGURES[self._preset.layout]).items()
        }
        rows = [
            {
                "of": kind,
                "class": each.name,
                **({"frequency": each.group} if each.group else {}),
                "objects": each.num_objects,
                **values(each),
            }
            for kind, of_kind in precisions.items()
            for each in of_kind
        ]
        with distributed.leaving_together():
            gallery = detection_gallery(found, self._tested) if is_first else None
        return TestOutcome(figures=figures, by_class=rows, num_untested=num_untested, gallery=gallery)

    def infos(self) -> dict[str, FigureInfo]:
        """Return the figures of boxes, masks and keypoints, where there are; Cityscapes measures masks alone."""
        layout = self._preset.layout
        kinds = ["mask"] if layout == "cityscapes" else ["box", "mask"] if self._preset.masks else ["box"]
        if self._preset.keypoints:
            kinds = ["keypoint", *kinds]
        return {
            self._name(kind, name): FigureInfo(
                title=self._name(kind, name), caption=_CAPTIONS[name].format(_KINDS[kind])
            )
            for kind in kinds
            for name in _FIGURES[layout]
        }

    def _name(self, kind: str, figure: str) -> str:
        return figure if self._preset.layout in ("voc", "cityscapes") else f"{kind} {figure}"


def values(precision: ClassPrecision) -> dict[str, float]:
    """Return a class's figures by their names."""
    at = precision.at
    return {"AP50": at[0], "AP": precision.mean, "AP75": at[OVERLAPS.index(0.75)]}


def mean_values(precisions: Sequence[ClassPrecision], names: Sequence[str]) -> dict[str, float]:
    """Return means over classes, or over those of a group; without the groups that no class is of."""
    means: dict[str, float] = {}
    for name in names:
        group = _GROUPS.get(name)
        of_classes = [values(each)["AP" if group else name] for each in precisions if group in (None, each.group)]
        if of_classes:
            means[name] = fmean(of_classes)
    return means


@torch.no_grad()
def find_all(
    model: nn.Module, data: DetectionSet, preset: DetectPreset, machine: Machine, *, stop: Callable[[str], None]
) -> tuple[Detections, int]:
    """Find objects in all images of a set; collective, every rank gets all of them.

    Args:
        model: on the machine's device; it is left in evaluation mode.
        data: the set.
        preset: sizes of images.
        machine: where; ranks share the images.
        stop: as of `in_turn`, called before each image.

    Returns:
        what was found, and the number of this rank's images that cannot be decoded.
    """
    model.eval()
    parts: list[tuple[Any, ...]] = []
    num_untested = 0
    images = HeldOutImages(data, preset, world=machine.world, threads=machine.threads)

    def find(each: HeldOutImage) -> None:
        nonlocal num_untested
        if each.image is None:
            num_untested += 1
            return
        with machine.autocast():
            [found] = model([each.image.to(machine.device)])
        parts.append(_as_arrays(found, each))

    in_turn(images, find, num_turns=ceil(len(data) / machine.world.world_size), stop=stop)
    of_ranks = [parts]
    if machine.world.world_size > 1:
        of_ranks *= machine.world.world_size
        dist.all_gather_object(of_ranks, parts)
    return _all_of([each for part in of_ranks for each in part], preset, len(data.keypoints or ())), num_untested


def _all_of(of_images: Sequence[tuple[Any, ...]], preset: DetectPreset, num_keypoints: int) -> Detections:
    numbers, floats = np.empty(0, np.int64), np.empty(0, np.float32)
    empty = (numbers, floats.reshape(0, 4), numbers, floats, floats.reshape(0, num_keypoints, 3), [])
    *arrays, masks = zip(empty, *of_images, strict=True)
    image, boxes, classes, scores, keypoints = map(np.concatenate, arrays)
    return Detections(
        image=image,
        boxes=boxes,
        classes=classes,
        scores=scores,
        masks=[each for of_image in masks for each in of_image] if preset.masks else None,
        keypoints=keypoints if preset.keypoints else None,
    )


def in_own_pixels(found: dict[str, Tensor], image: HeldOutImage) -> dict[str, Tensor]:
    """Return what a detector found in an image, in the image's own pixels; masks (D, height, width) bool."""
    boxes = found["boxes"].float() * found["boxes"].new_tensor(image.scale * 2, dtype=torch.float32)
    own = {"boxes": boxes, "labels": found["labels"], "scores": found["scores"].float()}
    if "masks" in found:
        # (D, 1, height, width) 0..1
        own["masks"] = paste_masks_in_image(found["masks"], boxes, image.size)[:, 0] >= 0.5
    if "keypoints" in found:
        own["keypoints"] = found["keypoints"] * found["keypoints"].new_tensor((*image.scale, 1.0))
    return own


def _as_arrays(found: dict[str, Tensor], image: HeldOutImage) -> tuple[Any, ...]:
    """Return image, boxes, classes, scores, keypoints and masks of an image's detections, in its own pixels."""
    own = {name: value.cpu().numpy() for name, value in in_own_pixels(found, image).items()}
    boxes = own["boxes"]
    keypoints = own.get("keypoints", np.empty((len(boxes), 0, 3), np.float32))
    masks = encoded_masks(own["masks"].astype(np.uint8)) if "masks" in own else list[Any]()
    arrays = (boxes, own["labels"] - 1, own["scores"], keypoints)
    return np.full(len(boxes), image.number), *arrays, masks
