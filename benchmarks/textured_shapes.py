"""Synthetic set in VOC's layout: shapes with the texture of one photograph, pasted on others.

An object's class is the photograph that its texture was cut from: five gray ones, so that color says nothing, with
ellipses, boxes and triangles alike, so that outlines say nothing either. Textures and backgrounds of training and test
are from different parts of the photographs, as in the demo.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from moco_fast.demo import PHOTOGRAPHS, cut_positions, photograph_path

__all__ = ["CLASSES", "SIDE", "write_set"]

CLASSES = ("brick", "coins", "grass", "gravel", "print")
_BACKGROUNDS = ("astronaut", "camera", "cat", "clock", "coffee", "galaxies", "moon", "motorcycle", "retina", "rocket")
SIDE = 96
"""Height and width of an image in pixels."""
_OBJECT = (28, 44)  # smallest and largest side of an object in pixels
_BORDER = 255  # pixels on outlines belong to no class
_PARTS = {"train": ("trainval", "train_aug"), "test": ("test", "val")}  # of detection and of segmentation


def write_set(folder: Path, *, num_train: int, num_test: int, seed: int = 0) -> None:
    """Write VOC2012 with boxes and with classes of pixels, both of the same images.

    Args:
        folder: in which the year is written.
        num_train: images of trainval and train_aug.
        num_test: images of test and val.
        seed: of everything that is drawn.
    """
    year, rng = folder / "VOC2012", np.random.default_rng(seed)
    for name in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (year / name).mkdir(parents=True, exist_ok=True)
    paths = {name: photograph_path(PHOTOGRAPHS[name]) for name in (*CLASSES, *_BACKGROUNDS)}
    photographs = {name: Image.open(path).convert("RGB") for name, path in paths.items()}
    for split, num_images in (("train", num_train), ("test", num_test)):
        names = [f"{split}_{number:04}" for number in range(num_images)]
        for name in names:
            _write_image(year, name, photographs, rng, held_out=split == "test")
        for kind, part in zip(("Main", "Segmentation"), _PARTS[split], strict=True):
            (year / "ImageSets" / kind / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))


def _write_image(
    year: Path, name: str, photographs: dict[str, Image.Image], rng: np.random.Generator, *, held_out: bool
) -> None:
    image = _cut(photographs[rng.choice(_BACKGROUNDS)], SIDE, rng, held_out=held_out)
    classes = np.zeros((SIDE, SIDE), np.uint8)
    objects: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        number, (width, height) = int(rng.integers(len(CLASSES))), rng.integers(_OBJECT[0], _OBJECT[1] + 1, 2)
        left, top = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        outline = _shape(int(width), int(height), rng)
        texture = _cut(photographs[CLASSES[number]], max(_OBJECT), rng, held_out=held_out)
        place = np.s_[top : top + height, left : left + width]
        if classes[place].any():
            continue
        mask = np.asarray(outline) > 0
        image.paste(texture.crop((0, 0, int(width), int(height))), (left, top), outline)
        classes[place] = np.where(mask, np.where(_inner(mask), number + 1, _BORDER), classes[place])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (left + columns[0] + 1, top + rows[0] + 1, left + columns[-1] + 1, top + rows[-1] + 1)
        objects.append(_annotation(CLASSES[number], box))
    image.save(year / "JPEGImages" / f"{name}.jpg", quality=95)
    Image.fromarray(classes).save(year / "SegmentationClass" / f"{name}.png")
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
    (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")


def _cut(photograph: Image.Image, side: int, rng: np.random.Generator, *, held_out: bool) -> Image.Image:
    """Cut a square out of the parts of a photograph that are trained on, or out of those that are held out."""
    places = cut_positions(*photograph.size, side)[held_out]
    left, top = places[int(rng.integers(len(places)))]
    return photograph.crop((left, top, left + side, top + side))


def _shape(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    shape = Image.new("L", (width, height))
    draw, box = ImageDraw.Draw(shape), (0, 0, width - 1, height - 1)
    kind = int(rng.integers(3))
    if kind == 0:
        draw.rectangle(box, fill=255)
    elif kind == 1:
        draw.ellipse(box, fill=255)
    else:
        draw.polygon([(0, height - 1), (width - 1, height - 1), (int(rng.integers(width)), 0)], fill=255)
    return shape


def _inner(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels of a shape whose four neighbors are of it, too."""
    around = np.pad(mask, 1)
    return mask & around[2:, 1:-1] & around[:-2, 1:-1] & around[1:-1, 2:] & around[1:-1, :-2]


def _annotation(name: str, box: tuple[int, ...]) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    marked = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{marked}</bndbox></object>"
