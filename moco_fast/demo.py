"""Images of the demo: patches of photographs that scikit-image ships, so that nothing has to be downloaded.

    python -m moco_fast.demo OUT

    OUT/train/<photograph>/0000.jpg ...     what the encoder learns from
    OUT/val/<photograph>/0000.jpg ...       held out, from other parts of the same photographs
    OUT/demo.json                           the settings; written last

A patch's class is the photograph that it was cut from. Each photograph is divided into cells, every fourth one is held
out, and no patch crosses the margin between cells, so no pixel is used for both training and testing.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from shards.ground.files import appearing
from shards.ground.options import ending_quietly, parse_words

__all__ = ["PHOTOGRAPHS", "DemoConfig", "cut_positions", "main", "photograph_path", "write_images"]

PHOTOGRAPHS: dict[str, str] = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "handwriting": "text.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "print": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
"""Class name -> file among those that scikit-image ships."""

_STRIDE = 4  # pixels between neighboring patches
_HELD_OUT_EVERY = 4  # cells


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Cut the demo's images out of the photographs that scikit-image ships."""

    out: Annotated[str, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """Folder to write; not changed if it already holds the same images."""
    size: int = 64
    """Height and width of an image in pixels."""
    num_train: int = 256
    """Training images per photograph."""
    num_held_out: int = 64
    """Held-out images per photograph."""


def write_images(config: DemoConfig) -> bool:
    """Write the images; the same settings give the same bytes.

    Returns:
        whether images were written.

    Raises:
        ValueError: scikit-image's photographs are missing, `out` holds something else, or the photographs are too small
            for the requested images.
    """
    out = Path(config.out)
    settings = {"version": 1, **asdict(config)}
    del settings["out"]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _read_settings(out) == settings:
            return False
        raise ValueError(f"{out} exists and holds something else: remove it or choose another folder")
    photographs = {name: photograph_path(file) for name, file in PHOTOGRAPHS.items()}
    with appearing(out, durable=False) as aside:
        for name, path in photographs.items():
            with Image.open(path) as photograph:
                _cut(photograph, name, aside, config)
        (aside / "demo.json").write_text(json.dumps(settings, indent=2) + "\n")
    return True


def cut_positions(width: int, height: int, size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """List the positions (left, top) of patches in a photograph, for training and held out.

    Cells are about twice as wide and high as a patch, and held-out cells are spread over the whole photograph.
    """
    rows, columns = max(height // (2 * size), 1), max(width // (2 * size), 1)
    train: list[tuple[int, int]] = []
    held_out: list[tuple[int, int]] = []
    for row in range(rows):
        for column in range(columns):
            # Shifted by two columns in each row, so that held-out cells are never directly above each other.
            held = (column + 2 * row) % _HELD_OUT_EVERY == 1
            places = product(_starts(height, rows, row, size), _starts(width, columns, column, size))
            (held_out if held else train).extend((left, top) for top, left in places)
    return train, held_out


def _starts(length: int, cells: int, cell: int, size: int) -> range:
    """Return where a patch may start along one side of a photograph to lie well inside this cell."""
    inset = size // 8  # from either end of the cell: patches of two cells are twice this apart
    return range(length * cell // cells + inset, length * (cell + 1) // cells - inset - size + 1, _STRIDE)


def _cut(photograph: Image.Image, name: str, folder: Path, config: DemoConfig) -> None:
    image = photograph if photograph.mode == "L" else photograph.convert("RGB")
    train, held_out = cut_positions(*image.size, config.size)
    for split, positions, wanted in (("train", train, config.num_train), ("val", held_out, config.num_held_out)):
        if not 0 < wanted <= len(positions):
            raise ValueError(
                f"cannot cut {wanted} images of {config.size} pixels for {split} from {name!r}, which has room for "
                f"{len(positions)}: choose another number or a smaller size"
            )
        target = folder / split / name
        target.mkdir(parents=True)
        # Evenly spread over the photograph, without a random generator whose stream could change between versions.
        for number, chosen in enumerate(np.linspace(0, len(positions) - 1, wanted).round().astype(int)):
            left, top = positions[chosen]
            patch = image.crop((left, top, left + config.size, top + config.size))
            patch.save(target / f"{number:04d}.jpg", quality=95, subsampling=0)


def photograph_path(file: str) -> Path:
    """Return where scikit-image keeps one of its photographs.

    Raises:
        ValueError: scikit-image is missing, or does not ship it.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the demo's photographs come with scikit-image, which is missing: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        raise ValueError(f"this scikit-image does not ship {file}: pip install 'scikit-image>=0.25,<0.27'")
    return path


def _read_settings(out: Path) -> dict[str, object] | None:
    try:
        return json.loads((out / "demo.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    config = parse_words(DemoConfig, words, prog="python -m moco_fast.demo")
    try:
        written = write_images(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_classes = len(PHOTOGRAPHS)
    print(
        f"{config.out}: {num_classes * config.num_train:,} training and {num_classes * config.num_held_out:,} held-out "
        f"images of {config.size} x {config.size} pixels, {num_classes} classes{'' if written else ' (already there)'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
