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
from moco_fast.transfer.device_decoding import DeviceDecoder, is_plain
from moco_fast.transfer.keypoints import moved_keypoints
from moco_fast.transfer.order import repeat_factors, resized, training_draws
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, as_shown, opened_image
from moco_fast.transfer.shuffled import ShuffledImages, ahead
from pipelines.world import World

__all__ = ["HeldOutImage", "HeldOutImages", "TargetBatch", "TrainingImages", "augmented", "decoded", "held_out"]


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
            images=[_moved(image, device) for image in self.images],
            targets=[
                {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in self.targets
            ],
        )


def _moved(image: Tensor, device: torch.device) -> Tensor:
    if image.is_cuda:
        # Made on a stream of its own: its memory is free for others only once this stream's work is done.
        image.record_stream(torch.cuda.current_stream(image.device))
    return image.to(device, non_blocking=True)


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


class TrainingImages(ShuffledImages["_Item"]):
    """Images with boxes, in batches; grouped by whether they lie or stand.

    Args:
        data: all of its images have boxes.
        preset: batch size, sizes of images.
        seed: of order and augmentation.
        decoder: of plain JPEGs, on a GPU; None: all are decoded on the CPU.
        more: world, threads, at_most_damaged, as of `ShuffledImages`.
    """

    def __init__(
        self,
        data: DetectionSet,
        preset: DetectPreset,
        *,
        seed: int,
        decoder: DeviceDecoder | None = None,
        **more: Any,
    ) -> None:
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
        self._decoder, self._by_pillow = decoder, set[int]()

    def draws(self, numbers: npt.NDArray[np.int64], *, epoch: int) -> list[tuple[int, bool]]:
        """Return shorter sides, and whether images are mirrored."""
        return training_draws(numbers, self._preset.sides, seed=self._seed, epoch=epoch)

    def make(self, number: int, drawn: tuple[int, bool]) -> "_Item":
        """Resize and mirror an image and what is marked in it; what a device will decode is only read."""
        side, is_mirrored = drawn
        found, keypoints = self._data.images[number], self._data.keypoints
        partners = () if keypoints is None else keypoints.partners
        size = resized(found.height, found.width, side=side, longest=self._preset.longest)
        if self._decoder is None or number in self._by_pillow:
            image = _pictured(found, size, is_mirrored=is_mirrored)
        else:
            data = found.path.read_bytes()
            is_theirs = is_plain(data, (found.width, found.height))
            encoded = _EncodedImage(number=number, drawn=drawn, data=data, size=size)
            image = encoded if is_theirs else _pictured(found, size, is_mirrored=is_mirrored)
        return image, _marked(found, size, is_mirrored=is_mirrored, partners=partners)

    def together(self, items: "list[_Item]") -> TargetBatch:
        """Keep images apart, since they have sizes of their own."""
        while waiting := [image for image, _ in items if isinstance(image, _EncodedImage)]:
            items = self._decoded_on_device(items, waiting)
        images = [image for image, _ in items if isinstance(image, Tensor)]
        return TargetBatch(images=images, targets=[target for _, target in items])

    def _decoded_on_device(self, items: "list[_Item]", waiting: "list[_EncodedImage]") -> "list[_Item]":
        assert self._decoder is not None
        encoded, sizes = [each.data for each in waiting], [each.size for each in waiting]
        try:
            images = iter(self._decoder.resized(encoded, sizes, [each.drawn[1] for each in waiting]))
        except RuntimeError:
            # It does not say which one cannot be decoded: Pillow will, or replaces it.
            self._by_pillow |= {each.number for each in waiting}
            return [
                self.made(image.number, image.drawn) if isinstance(image, _EncodedImage) else (image, target)
                for image, target in items
            ]
        return [(next(images) if isinstance(image, _EncodedImage) else image, target) for image, target in items]


@dataclass(frozen=True, kw_only=True, eq=False)
class _EncodedImage:
    """An image that waits to be decoded on a device."""

    number: int
    drawn: tuple[int, bool]
    data: bytes
    size: tuple[int, int]
    """Height and width that it gets."""


_Item = tuple[Tensor | _EncodedImage, dict[str, Tensor]]


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
            image = decoded(found)
        except (OSError, SyntaxError):
            return HeldOutImage(number=number, image=None, scale=(1.0, 1.0), size=(found.height, found.width))
        return held_out(image, number, preset)


def held_out(image: Image.Image, number: int, preset: DetectPreset) -> HeldOutImage:
    """Resize an image, as it is shown, to the size in which it is tested; `number` is its own in its set."""
    height, width = resized(image.height, image.width, side=preset.test_side, longest=preset.longest)
    picture: Any = image
    pixels = v2.pil_to_tensor(v2.resize(picture, [height, width]))
    scale = (image.width / width, image.height / height)
    return HeldOutImage(number=number, image=pixels, scale=scale, size=(image.height, image.width))


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
    size = resized(found.height, found.width, side=side, longest=longest)
    image = _pictured(found, size, is_mirrored=is_mirrored)
    return image, _marked(found, size, is_mirrored=is_mirrored, partners=partners)


def _pictured(found: AnnotatedImage, size: tuple[int, int], *, is_mirrored: bool) -> Tensor:
    """Decode, resize and mirror an image, on the CPU."""
    # Pillow resizes the image, as in detectron2, outside of the interpreter's lock.
    image: Any = decoded(found)
    pixels = np.asarray(v2.resize(image, list(size)))
    # One copy mirrors, and may be written to; Pillow's own mirroring and torchvision's conversion make three.
    return torch.from_numpy((pixels[:, ::-1] if is_mirrored else pixels).copy()).permute(2, 0, 1)


def _marked(
    found: AnnotatedImage, size: tuple[int, int], *, is_mirrored: bool, partners: Sequence[int]
) -> dict[str, Tensor]:
    """Return what is marked in an image, once that is resized and mirrored."""
    corners: Any = torch.from_numpy(found.boxes)
    boxes: Any = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(found.height, found.width))  # pyright: ignore[reportCallIssue] - torch's metaclass hides it
    boxes = v2.resize(boxes, list(size))
    if is_mirrored:
        boxes = v2.horizontal_flip(boxes)
    target = {"boxes": boxes.as_subclass(Tensor), "labels": torch.from_numpy(found.classes + 1)}
    if found.outlines is not None:
        # Drawn in the size that is wanted: what is drawn first and resized then has coarser edges.
        target["masks"] = torch.from_numpy(drawn_masks(found, height=size[0], width=size[1], is_mirrored=is_mirrored))
    if found.keypoints is not None:
        scale = (size[1] / found.width, size[0] / found.height)
        moved = moved_keypoints(found.keypoints, scale=scale, width=size[1], is_mirrored=is_mirrored, partners=partners)
        target["keypoints"] = torch.from_numpy(moved)
    return target


def decoded(found: AnnotatedImage) -> Image.Image:
    """Decode an image as it is shown. Raises OSError, SyntaxError: it cannot be, or it is not as annotated."""
    with opened_image(found.path) as image:
        shown = as_shown(image)
    if shown.size != (found.width, found.height):
        raise OSError(f"it is {shown.width}x{shown.height}, not {found.width}x{found.height} as annotated")
    return shown
