"""Synthetic sets with classes of pixels, in the layouts of VOC and Cityscapes: colored boxes on noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {1: (220, 40, 40), 2: (40, 200, 60), 3: (50, 80, 230)}


def drawn(rng: np.random.Generator, *, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image, and its classes: 0 the background, 255 a border around each shape."""
    image = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
    classes = np.zeros((height, width), np.uint8)
    for left in (2, 34):
        number, top = int(rng.integers(1, 4)), int(rng.integers(2, 20))
        classes[top - 1 : top + 25, left - 1 : left + 25] = 255
        classes[top : top + 24, left : left + 24] = number
        image[top : top + 24, left : left + 24] = COLORS[number]
    return image, classes


def write_voc_pixels(year: Path, parts: dict[str, int], *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    for part, num_images in parts.items():
        keys = [f"{part}_{number:03}" for number in range(num_images)]
        for number, key in enumerate(keys):
            image, classes = drawn(rng)
            Image.fromarray(image).save(year / "JPEGImages" / f"{key}.jpg", quality=95)
            as_palette = Image.fromarray(classes).convert("P")
            as_palette.putdata(classes.ravel().tolist())
            # Only Hariharan's annotations have some of the images.
            kind = "SegmentationClassAug" if part.endswith("aug") and number % 2 else "SegmentationClass"
            as_palette.save(year / kind / f"{key}.png")
        (year / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"{key}\n" for key in keys))
    return year


def write_cityscapes(folder: Path, parts: dict[str, int], *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    ids = np.zeros(256, np.uint8)
    ids[:4] = (7, 26, 21, 23)  # road, car, vegetation, sky; 0, unlabeled, is no class
    for part, num_images in parts.items():
        for number in range(num_images):
            name = f"town_{number:06}_000019"
            image, classes = drawn(rng)
            for kind, ending, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", np.where(classes == 255, 0, ids[classes])),
            ):
                place = folder / kind / part / "town"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{name}_{ending}.png")
    return folder


def write_city_instances(folder: Path, parts: dict[str, int], *, seed: int = 0) -> Path:
    """Images of Cityscapes with files of instances: cars and persons, a group of cars, and what is void."""
    rng = np.random.default_rng(seed)
    for part, num_images in parts.items():
        for number in range(num_images):
            image = rng.integers(90, 160, (48, 64, 3), dtype=np.uint8)
            numbers = np.full((48, 64), 7, np.uint16)  # road
            numbers[:4] = 3  # out of roi
            for place, left in enumerate((2, 34)):
                top, label = int(rng.integers(6, 20)), int(rng.choice([24, 26]))
                numbers[top : top + 24, left : left + 24] = label * 1000 + place
                image[top : top + 24, left : left + 24] = COLORS[1 if label == 24 else 2]
            numbers[44:, 40:60] = 26
            for kind, ending, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_instanceIds", numbers),
            ):
                place = folder / kind / part / "town"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"town_{number:06}_000019_{ending}.png")
    return folder
