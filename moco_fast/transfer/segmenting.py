"""Semantic segmentation as a transfer task: its images, and mean intersection over union."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as v2

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import FigureInfo
from moco_fast.transfer.galleries import pixel_gallery
from moco_fast.transfer.order import crop_draws
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.pixel_sets import OPEN, PixelSet, read_pixels
from moco_fast.transfer.presets import SegmentPreset
from moco_fast.transfer.shuffled import ShuffledImages, ahead
from moco_fast.transfer.training import Machine, NetworkTrainings, TestOutcome, in_turn

__all__ = ["PixelBatch", "SegmenterTrainings", "TrainingCrops", "confusion_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelBatch:
    """This rank's part of a batch."""

    images: Tensor
    """(B, 3, crop, crop) uint8."""
    targets: Tensor
    """(B, crop, crop) uint8."""

    def to(self, device: torch.device) -> "PixelBatch":
        """Copy to a device."""
        return PixelBatch(
            images=self.images.to(device, non_blocking=True), targets=self.targets.to(device, non_blocking=True)
        )


class TrainingCrops(ShuffledImages[tuple[Tensor, Tensor]]):
    """Crops of images with the classes of their pixels, in batches.

    Args:
        data: the set.
        preset: batch size, crop and scales.
        fill: what lies beyond an image that is smaller than a crop, as a color.
        seed: of order and augmentation.
        more: world, threads, at_most_damaged, as of `ShuffledImages`.
    """

    def __init__(self, data: PixelSet, preset: SegmentPreset, *, fill: tuple[int, ...], seed: int, **more: Any) -> None:
        super().__init__(
            where=data.where,
            keys=[image.key for image in data.images],
            kinds=np.zeros(len(data), dtype=np.bool_),
            batch_size=preset.batch_size,
            group=1,
            seed=seed,
            **more,
        )
        self._data, self._preset, self._fill, self._seed = data, preset, fill, seed

    def draws(self, numbers: npt.NDArray[np.int64], *, epoch: int) -> list[tuple[float, tuple[float, float], bool]]:
        """Return scales, places of crops, and whether they are mirrored."""
        return crop_draws(numbers, self._preset.scales, seed=self._seed, epoch=epoch)

    def make(self, number: int, drawn: tuple[float, tuple[float, float], bool]) -> tuple[Tensor, Tensor]:
        """Scale, cut and mirror an image and its classes."""
        scale, place, is_mirrored = drawn
        image, classes = read_pixels(self._data.images[number], self._data.table)
        size = [max(1, round(image.height * scale)), max(1, round(image.width * scale))]
        picture: Any = image
        pixels: Any = v2.pil_to_tensor(v2.resize(picture, size))
        target: Any = v2.resize(torch.from_numpy(classes)[None], size, v2.InterpolationMode.NEAREST)
        return cropped(pixels, target[0], self._preset.crop, place=place, is_mirrored=is_mirrored, fill=self._fill)

    def together(self, items: list[tuple[Tensor, Tensor]]) -> PixelBatch:
        """Stack crops."""
        return PixelBatch(
            images=torch.stack([image for image, _ in items]), targets=torch.stack([target for _, target in items])
        )


def cropped(
    image: Tensor,
    classes: Tensor,
    crop: int,
    *,
    place: tuple[float, float],
    is_mirrored: bool,
    fill: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Cut a square out of an image and its classes; what lies beyond them below and to the right is filled.

    Args:
        image: (3, H, W) uint8.
        classes: (H, W) uint8.
        crop: side of the square in pixels.
        place: of its top and left, as shares of the places that there are.
        is_mirrored: whether left and right change sides.
        fill: color beyond the image; the class there is `OPEN`.
    """
    height, width = classes.shape
    top, left = (int(share * (max(side - crop, 0) + 1)) for share, side in zip(place, (height, width), strict=True))
    pixels = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, crop, crop)
    target = torch.full((crop, crop), OPEN, dtype=torch.uint8)
    part = classes[top : top + crop, left : left + crop]
    pixels[:, : part.shape[0], : part.shape[1]] = image[:, top : top + crop, left : left + crop]
    target[: part.shape[0], : part.shape[1]] = part
    return (pixels.flip(2), target.flip(1)) if is_mirrored else (pixels, target)


class SegmenterTrainings(NetworkTrainings):
    """Trainings of networks that name pixels. Arguments as of `NetworkTrainings`."""

    def __init__(self, train: PixelSet, test: PixelSet, preset: SegmentPreset, machine: Machine, **more: Any) -> None:
        if preset.head == "deeplabv3" and preset.batch_size == 1:
            raise ValueError(
                "--head deeplabv3 normalizes one value per image, which has no spread with --batch-size 1: give more"
            )
        super().__init__(train, test, preset, machine, **more)
        self._learned, self._tested, self._preset = train, test, preset

    def build(self, encoder: Encoder, *, seed: int) -> nn.Module:
        """Build the network."""
        return PixelNetwork(encoder, self._preset, num_classes=len(self._learned.class_names), seed=seed)

    def images(self, encoder: Encoder, *, seed: int) -> TrainingCrops:
        """Open this rank's batches of crops; beyond images is the encoder's mean color."""
        mean = (-encoder.pixel_shift / encoder.pixel_scale).round().clamp(0, 255)
        return TrainingCrops(
            self._learned,
            self._preset,
            fill=tuple(int(value) for value in mean.tolist()),
            seed=seed,
            world=self._machine.world,
            threads=self._machine.threads,
            at_most_damaged=self._at_most_damaged,
        )

    def measure(self, network: nn.Module) -> TestOutcome:
        """Name the pixels of all test images in their own size, and measure how many rightly."""
        confusion, values, num_untested = confusion_of(network, self._tested, self._machine, stop=self.leave)
        overlap, counts = _overlaps(confusion)
        right, there = confusion.diag(), confusion.sum(1)
        with distributed.leaving_together():
            if not counts.any():
                raise ValueError(
                    f"no pixel of {self._tested.where} that could be decoded has one of the classes, so there is "
                    "nothing to measure: are its files whole, and those that docs/transfer.md names?"
                )
        figures = {
            "mIoU": overlap[counts].mean().item(),
            "accuracy": (right.sum() / confusion.sum().clamp(min=1)).item(),
        }
        rows = [
            {"class": name, "pixels": int(there[number]), "IoU": overlap[number].item()}
            for number, name in enumerate(self._tested.class_names)
            if counts[number]
        ]
        gallery = None
        with distributed.leaving_together():
            if self._machine.world.rank == 0:
                gallery = pixel_gallery(values.numpy(), self._tested, lambda image: self._named(network, image))
        return TestOutcome(figures=figures, by_class=rows, num_untested=num_untested, gallery=gallery)

    @torch.no_grad()
    def _named(self, network: nn.Module, image: Image.Image) -> npt.NDArray[np.int64]:
        pixels = v2.pil_to_tensor(image).to(self._machine.device)
        with self._machine.autocast():
            return network(pixels[None])[0].argmax(0).cpu().numpy()

    def infos(self) -> dict[str, FigureInfo]:
        """Return mean intersection over union, and accuracy."""
        return {
            "mIoU": FigureInfo(
                title="mIoU", caption="Mean over the classes of intersection over union of all pixels of a class."
            ),
            "accuracy": FigureInfo(title="pixel accuracy", caption="Share of pixels that are named rightly."),
        }


@torch.no_grad()
def confusion_of(
    network: nn.Module, data: PixelSet, machine: Machine, *, stop: Callable[[str], None]
) -> tuple[Tensor, Tensor, int]:
    """Count the pixels of each class that are named each class; collective, every rank gets the whole.

    Args:
        network: on the machine's device; it is left in evaluation mode.
        data: the set; ranks share its images.
        machine: where.
        stop: as of `in_turn`, called before each image.

    Returns:
        (K, K) int64, rows for what is there; (I,) float64, each image's own mean intersection over union, NaN where
        nothing counts or it cannot be decoded; and the number of this rank's images that cannot be.
    """
    network.eval()
    num_classes, num_untested, world = len(data.class_names), 0, machine.world
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=machine.device)
    values = torch.zeros(len(data), dtype=torch.float64, device=machine.device)
    numbers = range(world.rank, len(data), world.world_size)

    def count(turn: tuple[int, Future[tuple[Tensor, Tensor] | None]]) -> None:
        nonlocal num_untested
        number, future = turn
        found = future.result()
        if found is None:
            num_untested += 1
            values[number] = torch.nan
            return
        image, classes = (each.to(machine.device) for each in found)
        with machine.autocast():
            named = network(image[None])[0].argmax(0)
        counted = classes != OPEN
        pairs = classes[counted].long() * num_classes + named[counted]
        of_image = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        overlap, is_counted = _overlaps(of_image)
        values[number] = overlap.sum() / is_counted.sum()
        counts.add_(of_image)

    with ThreadPoolExecutor(machine.threads) as pool:
        futures = ahead(lambda number: pool.submit(_decoded, data, number), numbers)
        turns = zip(numbers, futures, strict=True)
        in_turn(turns, count, num_turns=ceil(len(data) / world.world_size), stop=stop)
    if world.world_size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(values)
    return counts.cpu(), values.cpu(), num_untested


def _overlaps(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K) -> (K,) float64 intersection over union of each class, and whether it is there or is named."""
    right = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - right
    return right.double() / union.clamp(min=1), union > 0


def _decoded(data: PixelSet, number: int) -> tuple[Tensor, Tensor] | None:
    try:
        image, classes = read_pixels(data.images[number], data.table)
    except (OSError, SyntaxError):
        return None
    return v2.pil_to_tensor(image), torch.from_numpy(classes)
