"""Loaders of images with boxes, masks and keypoints."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from moco_fast.transfer.coco import drawn_masks
from moco_fast.transfer.keypoints import moved_keypoints
from moco_fast.transfer.order import repeat_factors, resized, training_draws
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, as_shown, opened_image
from moco_fast.transfer.shuffled import ShuffledImages, ahead
from pipelines.world import World

__all__ = ["HeldOutImage", "HeldOutImages", "TargetBatch", "TrainingImages", "augmented", "decoded"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """This rank's part of a batch."""

    images: list[Tensor]
    """(3, H, W) uint8 each."""
    targets: list[dict[str, Tensor]]
    """boxes (N, 4) float32 in pixels of the image, labels (N,) int64 from 1; where there are, masks (N, H, W) uint8 and
    keypoints (N, K, 3) float32: x, y, and 0 where one is not marked."""

    def to(self, device: torch.device) -> "TargetBatch":
        """Copy to a device."""
        return TargetBatch(
            images=[image.to(device, non_blocking=True) for image in self.images],
            targets=[
                {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in self.targets
            ],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutImage:
    """An image in the size in which it is tested."""

    number: int
    """In the set."""
    image: Tensor | None
    """(3, H, W) uint8; None: it cannot be decoded."""
    scale: tuple[float, float]
    """What a box's x and y are multiplied with to be in the image's own pixels."""
    size: tuple[int, int]
    """Its own height and width."""


class TrainingImages(ShuffledImages[tuple[Tensor, dict[str, Tensor]]]):
    """Images with boxes, in batches; grouped by whether they lie or stand.

    Args:
        data: all of its images have boxes.
        preset: batch size, sizes of images.
        seed: of order and augmentation.
        more: world, threads, at_most_damaged, as of `ShuffledImages`.
    """

    def __init__(self, data: DetectionSet, preset: DetectPreset, *, seed: int, **more: Any) -> None:
        super().__init__(
            where=data.where,
            keys=[image.key for image in data.images],
            kinds=data.lies,
            batch_size=preset.batch_size,
            group=preset.group,
            factors=_factors(data, preset),
            seed=seed,
            **more,
        )
        self._data, self._preset, self._seed = data, preset, seed

    def draws(self, numbers: npt.NDArray[np.int64], *, epoch: int) -> list[tuple[int, bool]]:
        """Return shorter sides, and whether images are mirrored."""
        return training_draws(numbers, self._preset.sides, seed=self._seed, epoch=epoch)

    def make(self, number: int, drawn: tuple[int, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """Resize and mirror an image and what is marked in it."""
        side, is_mirrored = drawn
        found, keypoints = self._data.images[number], self._data.keypoints
        partners = () if keypoints is None else keypoints.partners
        return augmented(found, side=side, longest=self._preset.longest, is_mirrored=is_mirrored, partners=partners)

    def together(self, items: list[tuple[Tensor, dict[str, Tensor]]]) -> TargetBatch:
        """Keep images apart, since they have sizes of their own."""
        return TargetBatch(images=[image for image, _ in items], targets=[target for _, target in items])


def _factors(data: DetectionSet, preset: DetectPreset) -> npt.NDArray[np.float64] | None:
    if not preset.repeat_threshold:
        return None
    return repeat_factors([image.classes for image in data.images], threshold=preset.repeat_threshold)


class HeldOutImages:
    """Images of a set in the size in which they are tested, this rank's part of them.

    Args:
        data: the set.
        preset: sizes of images.
        world: ranks take the images in turn.
        threads: that decode.
    """

    def __init__(self, data: DetectionSet, preset: DetectPreset, *, world: World, threads: int) -> None:
        self._data, self._preset, self._threads = data, preset, threads
        self._numbers = range(world.rank, len(data), world.world_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Generator[HeldOutImage]:
        with ThreadPoolExecutor(self._threads) as pool:
            for future in ahead(lambda number: pool.submit(self._make, number), self._numbers):
                yield future.result()

    def _make(self, number: int) -> HeldOutImage:
        found, preset = self._data.images[number], self._preset
        try:
            image: Any = decoded(found)
        except (OSError, SyntaxError):
            return HeldOutImage(number=number, image=None, scale=(1.0, 1.0), size=(found.height, found.width))
        height, width = resized(found.height, found.width, side=preset.test_side, longest=preset.longest)
        pixels = v2.pil_to_tensor(v2.resize(image, [height, width]))
        scale = (found.width / width, found.height / height)
        return HeldOutImage(number=number, image=pixels, scale=scale, size=(found.height, found.width))


def augmented(
    found: AnnotatedImage, *, side: int, longest: int, is_mirrored: bool, partners: Sequence[int] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Resize an image with its boxes, masks and keypoints, and mirror it.

    Args:
        found: the image.
        side: its shorter side afterwards, in pixels.
        longest: of its other side, at most.
        is_mirrored: whether left and right change sides.
        partners: of keypoints, as of `Keypoints`.

    Raises:
        OSError, SyntaxError: it cannot be decoded.
    """
    # Pillow resizes the image, as in detectron2, outside of the interpreter's lock.
    image: Any = decoded(found)
    corners: Any = torch.from_numpy(found.boxes)
    boxes: Any = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(found.height, found.width))  # pyright: ignore[reportCallIssue] - torch's metaclass hides it
    size = list(resized(found.height, found.width, side=side, longest=longest))
    image, boxes = v2.resize(image, size), v2.resize(boxes, size)
    if is_mirrored:
        image, boxes = v2.horizontal_flip(image), v2.horizontal_flip(boxes)
    target = {"boxes": boxes.as_subclass(Tensor), "labels": torch.from_numpy(found.classes + 1)}
    if found.outlines is not None:
        # Drawn in the size that is wanted: what is drawn first and resized then has coarser edges.
        target["masks"] = torch.from_numpy(drawn_masks(found, height=size[0], width=size[1], is_mirrored=is_mirrored))
    if found.keypoints is not None:
        scale = (size[1] / found.width, size[0] / found.height)
        moved = moved_keypoints(found.keypoints, scale=scale, width=size[1], is_mirrored=is_mirrored, partners=partners)
        target["keypoints"] = torch.from_numpy(moved)
    return v2.pil_to_tensor(image), target


def decoded(found: AnnotatedImage) -> Image.Image:
    """Decode an image as it is shown. Raises OSError, SyntaxError: it cannot be, or it is not as annotated."""
    with opened_image(found.path) as image:
        shown = as_shown(image)
    if shown.size != (found.width, found.height):
        raise OSError(f"it is {shown.width}x{shown.height}, not {found.width}x{found.height} as annotated")
    return shown
