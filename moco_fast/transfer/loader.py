"""Loaders of images with boxes: threads decode and resize ahead, and any step of a training can be the first."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from moco_fast.transfer.coco import drawn_masks
from moco_fast.transfer.order import epoch_batches, resized, steps_per_epoch, training_draws
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet
from pipelines.world import World

__all__ = ["HeldOutImage", "HeldOutImages", "TargetBatch", "TrainingImages"]

T = TypeVar("T")
Item = TypeVar("Item")

# Batches, or test images, that are decoded ahead of the one that is wanted.
_AHEAD = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatch:
    """This rank's part of a batch."""

    images: list[Tensor]
    """(3, H, W) uint8 each."""
    targets: list[dict[str, Tensor]]
    """boxes (N, 4) float32 in pixels of the image, labels (N,) int64 from 1; masks (N, H, W) uint8 where there are."""

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


class TrainingImages:
    """Augmented batches of a set without end, from a step on; the same whatever the number of ranks and threads.

    An image that cannot be decoded is replaced by the next one of the set that lies, or stands, as it does.

    Args:
        data: all of its images have boxes.
        preset: batch size, sizes of images.
        seed: of order and augmentation.
        world: each rank gets its part of every batch.
        threads: that decode.
        at_most_damaged: share of the set's images.

    Raises:
        ValueError: there are too few images for a batch.
    """

    def __init__(
        self,
        data: DetectionSet,
        preset: DetectPreset,
        *,
        seed: int,
        world: World,
        threads: int,
        at_most_damaged: float,
    ) -> None:
        self._data, self._preset, self._seed, self._world = data, preset, seed, world
        self._lies = data.lies
        self._steps = steps_per_epoch(self._lies, batch_size=preset.batch_size, group=preset.group)
        if not self._steps:
            raise ValueError(
                f"{data.where} has {len(data):,} images with boxes, too few for a batch of {preset.batch_size} in "
                f"groups of {preset.group} that lie or stand: give a smaller --batch-size"
            )
        self._pool = ThreadPoolExecutor(threads)
        self._at_most_damaged = at_most_damaged * len(data)
        self.damaged: dict[str, str] = {}
        """Images that this rank has replaced, with the reason."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, step: int) -> Generator[TargetBatch]:
        """Give this rank's part of each batch, from that of a step on."""
        # One batch is one task for each of its images, so that threads share it.
        for futures in _ahead(self._begin, count(step)):
            images, targets = zip(*(future.result() for future in futures), strict=True)
            yield TargetBatch(images=list(images), targets=list(targets))

    def _begin(self, step: int) -> list[Future[tuple[Tensor, dict[str, Tensor]]]]:
        epoch, row = divmod(step, self._steps)
        preset = self._preset
        order = epoch_batches(
            self._lies, seed=self._seed, epoch=epoch, batch_size=preset.batch_size, group=preset.group
        )
        share = preset.batch_size // self._world.world_size
        numbers = order[row, self._world.rank * share :][:share]
        draws = training_draws(numbers, preset.sides, seed=self._seed, epoch=epoch)
        return [self._pool.submit(self._make, int(number), *draw) for number, draw in zip(numbers, draws, strict=True)]

    def _make(self, number: int, side: int, is_mirrored: bool) -> tuple[Tensor, dict[str, Tensor]]:
        while True:
            found = self._data.images[number]
            try:
                return augmented(found, side=side, longest=self._preset.longest, is_mirrored=is_mirrored)
            except (OSError, SyntaxError) as error:
                self._leave_out(found, error)
            alike = np.flatnonzero(self._lies == self._lies[number])
            number = int(alike[np.searchsorted(alike, number, side="right") % len(alike)])

    def _leave_out(self, image: AnnotatedImage, error: Exception) -> None:
        if image.key in self.damaged:
            return
        self.damaged[image.key] = str(error)
        print(f"{image.path} cannot be decoded ({error}): another image takes its place", file=sys.stderr)
        if len(self.damaged) > self._at_most_damaged:
            raise ValueError(
                f"{len(self.damaged)} images of {self._data.where} cannot be decoded, more than --max-malformed "
                "allows: copy them again, or allow a larger share"
            )


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
            for future in _ahead(lambda number: pool.submit(self._make, number), self._numbers):
                yield future.result()

    def _make(self, number: int) -> HeldOutImage:
        found, preset = self._data.images[number], self._preset
        try:
            image: Any = _decoded(found)
        except (OSError, SyntaxError):
            return HeldOutImage(number=number, image=None, scale=(1.0, 1.0), size=(found.height, found.width))
        height, width = resized(found.height, found.width, side=preset.test_side, longest=preset.longest)
        pixels = v2.pil_to_tensor(v2.resize(image, [height, width]))
        scale = (found.width / width, found.height / height)
        return HeldOutImage(number=number, image=pixels, scale=scale, size=(found.height, found.width))


def augmented(found: AnnotatedImage, *, side: int, longest: int, is_mirrored: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Resize an image with its boxes and masks, and mirror it.

    Raises:
        OSError, SyntaxError: it cannot be decoded.
    """
    # Pillow resizes the image, as in detectron2, outside of the interpreter's lock.
    image: Any = _decoded(found)
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
    return v2.pil_to_tensor(image), target


def _decoded(found: AnnotatedImage) -> Image.Image:
    with Image.open(found.path) as image:
        if image.size != (found.width, found.height):
            raise OSError(f"it is {image.width}x{image.height}, not {found.width}x{found.height} as annotated")
        return image.convert("RGB")


def _ahead(begin: Callable[[Item], T], items: Iterable[Item]) -> Generator[T]:
    """Begin some items ahead of the one that is given."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > _AHEAD:
            yield begun.popleft()
    yield from begun
