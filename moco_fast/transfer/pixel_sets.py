"""Sets of images of which every pixel has a class, in the benchmarks' own layouts. Imports no torch.

VOC2012/ImageSets/Segmentation/val.txt       names of the images of a part
VOC2012/JPEGImages/2007_000033.jpg
VOC2012/SegmentationClass/2007_000033.png    classes as palette colors: 0 the background, 255 left open
VOC2012/SegmentationClassAug/...             the same of images that Hariharan et al. (2011) annotated

leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.transfer.cityscapes import CITYSCAPES_CLASSES, find_cityscapes
from moco_fast.transfer.presets import SegmentPreset
from moco_fast.transfer.sets import Malformed, as_shown, opened_image, read_list, size_as_shown
from moco_fast.transfer.voc import VOC_CLASSES, find_parts
from shards.ground.digests import running_digest
from shards.ground.errors import PackError
from shards.sets.benchmark import AnyPath

__all__ = ["OPEN", "PixelSet", "PixelsOfImage", "read_pixel_sets", "read_pixels", "refuse_open"]

OPEN = 255
"""Class of pixels that are neither learned from nor tested."""

_UNKNOWN = 254
_MODES = ("P", "L")  # of files with numbers of classes


@dataclass(frozen=True, kw_only=True)
class PixelsOfImage:
    """An image, and the file of its pixels' classes."""

    image: AnyPath
    classes: AnyPath
    key: str
    """Its name within the set."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelSet:
    """Images with classes of pixels, in a fixed order."""

    where: str
    """For people."""
    class_names: tuple[str, ...]
    images: Sequence[PixelsOfImage]
    numbers: tuple[int, ...] = ()
    """What a file has for each class; empty: the class's own number."""
    malformed: Sequence[Malformed] = ()
    """What was left out."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> str:
        """Digest of names, and of the sizes of the files."""
        whole = running_digest()
        for each in self.images:
            sizes = (each.image.stat().st_size, each.classes.stat().st_size)
            whole.update(f"{each.key} {sizes} ".encode())
        return whole.hexdigest()

    @cached_property
    def table(self) -> npt.NDArray[np.uint8]:
        """(256,) class of what a file has; `OPEN` for what does not count, `_UNKNOWN` for what the layout has not."""
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        numbers = self.numbers or range(len(self.class_names))
        table[: max(numbers) + 1] = table[OPEN] = OPEN
        table[list(numbers)] = np.arange(len(self.class_names))
        return table


def read_pixel_sets(folders: Sequence[str], preset: SegmentPreset) -> tuple[PixelSet, PixelSet]:
    """Find the images of what a preset trains and tests on.

    Raises:
        ValueError: a part is not there.
    """
    read = {"voc": _read_voc, "cityscapes": _read_cityscapes}[preset.layout]
    return read(folders, preset.train, option="--train"), read(folders, preset.test, option="--test")


def _read_voc(folders: Sequence[str], parts: Sequence[str], *, option: str) -> PixelSet:
    found: list[PixelsOfImage] = []
    places = find_parts(folders, parts, option=option, lists="Segmentation")
    for folder, part in places:
        for name in read_list(folder / "ImageSets" / "Segmentation" / f"{part}.txt"):
            there = [folder / kind / f"{name}.png" for kind in ("SegmentationClass", "SegmentationClassAug")]
            classes = next((path for path in there if path.is_file()), there[0])
            image = folder / "JPEGImages" / f"{name}.jpg"
            found.append(PixelsOfImage(image=image, classes=classes, key=f"{folder.name}/{name}"))
    images, malformed = _usable(found)
    where = ", ".join(f"{folder}/{part}" for folder, part in places)
    return PixelSet(where=where, class_names=("background", *VOC_CLASSES), images=images, malformed=malformed)


def _read_cityscapes(folders: Sequence[str], parts: Sequence[str], *, option: str) -> PixelSet:
    found = [
        PixelsOfImage(image=image, classes=classes, key=key)
        for key, image, classes in find_cityscapes(folders, parts, option=option, ending="gtFine_labelIds.png")
    ]
    images, malformed = _usable(found)
    return PixelSet(
        where=", ".join(f"{folder} {part}" for folder in folders for part in parts),
        class_names=tuple(CITYSCAPES_CLASSES),
        images=images,
        numbers=tuple(CITYSCAPES_CLASSES.values()),
        malformed=malformed,
    )


def _usable(found: Sequence[PixelsOfImage]) -> tuple[list[PixelsOfImage], list[Malformed]]:
    """Return what can be used, as far as headers say, and what cannot."""
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_why_not, found))
    images = [each for each, reason in zip(found, reasons, strict=True) if reason is None]
    malformed = [
        Malformed(key=each.key, reason=reason)
        for each, reason in zip(found, reasons, strict=True)
        if reason is not None
    ]
    return images, malformed


def _why_not(found: PixelsOfImage) -> str | None:
    if not found.classes.is_file():
        return "has no classes of pixels"
    size = size_as_shown(found.image)
    if isinstance(size, str):
        return size
    try:
        with found.classes.open("rb") as file, Image.open(file) as image:
            if image.mode not in _MODES:
                return f"has classes of pixels in mode {image.mode}, where numbers have P or L"
            return None if image.size == size else "is of another size than its classes of pixels"
    except PackError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "has classes of pixels that are no image"


def refuse_open(data: PixelSet) -> None:
    """Refuse a set without a pixel that counts, before a training. Looks at images up to the first that has one.

    Raises:
        ValueError: there is none, as in the files that stand for Cityscapes' secret test set.
    """
    for each in data.images:
        try:
            if (read_pixels(each, data.table)[1] != OPEN).any():
                return
        except (OSError, SyntaxError):
            continue
    raise ValueError(
        f"no pixel of {data.where} that can be decoded has one of the classes, so there is nothing to learn or to "
        "measure: are its files whole, and those that docs/transfer.md names? Classes of Cityscapes' test images are "
        "not published"
    )


def read_pixels(found: PixelsOfImage, table: npt.NDArray[np.uint8]) -> tuple[Image.Image, npt.NDArray[np.uint8]]:
    """Decode an image and the classes of its pixels, (H, W).

    Raises:
        OSError, SyntaxError: one of them cannot be decoded, they are of two sizes, or a pixel's class is unknown.
    """
    with opened_image(found.image) as image:
        pixels = as_shown(image)
    with opened_image(found.classes) as image:
        if image.mode not in _MODES:
            raise OSError(f"{found.classes.name} has mode {image.mode}, where numbers of classes have P or L")
        classes = np.asarray(image)
    if classes.shape != (pixels.height, pixels.width):
        raise OSError(f"{found.classes.name} is of another size than its image")
    named = table[classes]
    if (named == _UNKNOWN).any():
        number = int(classes[named == _UNKNOWN][0])
        raise OSError(f"{found.classes.name} has pixels of class {number}, which its layout does not have")
    return pixels, named
