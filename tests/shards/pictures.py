"""Small images for tests, and folders of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth random image: JPEG keeps it close to what it was."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    """A small baseline JPEG."""
    return encoded(picture(seed), "JPEG", quality=90, **options)


def fill(folder: Path, count: int, *, classes: int = 0) -> Path:
    """Write `count` JPEGs, all different, in `classes` folders or flat."""
    for i in range(count):
        parent = folder / f"class{i % classes}" if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{i:04d}.jpg").write_bytes(jpeg(i))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
