"""Synthetic VOC years: colored shapes on noise, which a tiny detector learns in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"bus": (220, 40, 40), "car": (40, 200, 60), "cat": (50, 80, 230)}


def write_year(year: Path, parts: dict[str, int], *, seed: int = 0, names: dict[str, tuple] | None = None) -> Path:
    """Write `parts` (name -> number of images) as a year of VOC; an ellipse or a box of each class's own color."""
    rng = np.random.default_rng(seed)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    for part, num_images in parts.items():
        keys = [f"{part}_{number:04}" for number in range(num_images)]
        for key in keys:
            write_image(year, key, rng, names or COLORS)
        (year / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{key}\n" for key in keys))
    return year


def write_image(year: Path, key: str, rng: np.random.Generator, colors: dict[str, tuple]) -> None:
    width, height = (96, 64) if rng.random() < 0.6 else (64, 96)
    image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
    draw, objects = ImageDraw.Draw(image), []
    for left in range(0, width - 31, 32):
        name, size = list(colors)[rng.integers(len(colors))], int(rng.integers(20, 31))
        x = left + int(rng.integers(0, 32 - size + 1))
        y = int(rng.integers(0, height - size + 1))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + size - 1, y + size - 1), fill=colors[name])
        objects.append((name, (x + 1, y + 1, x + size, y + size)))
    image.save(year / "JPEGImages" / f"{key}.jpg", quality=95)
    (year / "Annotations" / f"{key}.xml").write_text(annotation(width, height, objects))


def annotation(width: int, height: int, objects: list, *, difficult: int = 0) -> str:
    """XML of an image; `objects`: (name, (xmin, ymin, xmax, ymax)) as VOC counts pixels."""
    marked = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, box in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{marked}</annotation>"
