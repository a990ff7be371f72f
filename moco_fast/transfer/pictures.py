"""Pictures of a test: the best, the worst and some other images, with what is marked in them and what was found.

    OUT/pictures/NAME.json    of a training: all that a page shows of them, the images' pixels too

Imports no torch.
"""

import base64
import colorsys
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.ground.files import write_whole

__all__ = [
    "Gallery",
    "Mark",
    "Panel",
    "ShownImage",
    "ShownNumbers",
    "choose",
    "color_of",
    "decoded_image",
    "encoded_image",
    "encoded_layer",
]

_SIDE = 384  # pixels, of a picture's longest side
_NUM_COLORS = 250  # classes beyond have the colors of the first ones again

_EXTREMES, _SPREAD = 4, 6
_OPACITY = 150  # of 255, of what lies over an image


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An object, or an area of pixels of one class."""

    label: int
    """Number of its class."""
    text: str
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom in pixels of the image as it is on disk; None: `point` says where it is."""
    point: tuple[float, float] | None = None
    """x and y within an area of pixels."""
    is_matched: bool = True
    """Of the truth: whether it was found; of what was found: whether it is right."""
    keypoints: tuple[tuple[float, float], ...] = ()
    """x and y of those that are there."""
    lines: tuple[tuple[float, float, float, float], ...] = ()
    """x and y of both ends of what connects them."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What lies over an image."""

    marks: tuple[Mark, ...]
    layer: str = ""
    """Data URL of masks or of the classes of pixels; empty: there are none."""


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image, and what is to be compared on it."""

    key: str
    width: int
    height: int
    pixels: str
    """Data URL."""
    value: float
    """What the measure of the gallery gives it, 0..1."""
    truth: Panel
    found: Panel


@dataclass(frozen=True, kw_only=True)
class ShownNumbers:
    """Numbers of images of a test set."""

    best: tuple[int, ...]
    worst: tuple[int, ...]
    spread: tuple[int, ...]
    """Evenly spread over the set, whatever was found."""

    @property
    def all(self) -> list[int]:
        """Each number once."""
        return sorted({*self.best, *self.worst, *self.spread})


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures of a test."""

    measure: str
    """How images are ranked, in a sentence."""
    chosen: ShownNumbers
    images: dict[int, ShownImage]

    @classmethod
    def of(
        cls,
        measure: str,
        values: npt.NDArray[np.float64],
        make: Callable[[int], ShownImage],
        *,
        then: npt.NDArray[np.float64] | None = None,
    ) -> Self:
        """Choose images and make their pictures.

        Args:
            measure: what the values are, in a sentence.
            values: (N,) as `choose` takes them.
            make: makes the picture of an image; one that cannot be decoded (OSError, SyntaxError) is not shown.
            then: (N,) as `choose` takes it.
        """
        values, images = values.copy(), dict[int, ShownImage]()
        while missing := set((chosen := choose(values, then)).all) - set(images):
            for number in missing:
                try:
                    images[number] = make(number)
                except (OSError, SyntaxError):
                    values[number] = np.nan
        return cls(measure=measure, chosen=chosen, images={number: images[number] for number in chosen.all})

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(asdict(self)) + "\n", durable=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ValueError: it is not there, or not what `write` wrote.
        """
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                measure=told["measure"],
                chosen=ShownNumbers(**{name: tuple(map(int, each)) for name, each in told["chosen"].items()}),
                images={int(number): _image(each) for number, each in told["images"].items()},
            )
        except FileNotFoundError:
            raise ValueError(f"{path} is not there: its training was tested before pictures were kept") from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of pictures ({error!r}): remove it") from None


def _image(told: dict[str, Any]) -> ShownImage:
    panels: dict[str, Any] = {
        name: Panel(layer=told[name]["layer"], marks=tuple(_mark(each) for each in told[name]["marks"]))
        for name in ("truth", "found")
    }
    return ShownImage(**(told | panels))


def _mark(told: dict[str, Any]) -> Mark:
    fields: dict[str, Any] = told | {name: told[name] and tuple(told[name]) for name in ("box", "point")}
    fields |= {name: tuple(map(tuple, told[name])) for name in ("keypoints", "lines")}
    return Mark(**fields)


def choose(values: npt.NDArray[np.float64], then: npt.NDArray[np.float64] | None = None) -> ShownNumbers:
    """Choose the images with the highest and the lowest values, and some that are evenly spread.

    Args:
        values: (N,) of each image of the set; NaN: it is not shown.
        then: (N,) what decides between equal values.
    """
    shown = np.flatnonzero(np.isfinite(values))
    then = np.zeros(len(values)) if then is None else then
    order = shown[np.lexsort((shown, -then[shown], -values[shown]))]
    num = min(_EXTREMES, (len(order) + 1) // 2)
    spread = shown[np.unique(np.linspace(0, len(shown) - 1, min(_SPREAD, len(shown))).round().astype(int))]
    best, worst = order[:num], order[num:][::-1][:num]
    return ShownNumbers(best=tuple(best.tolist()), worst=tuple(worst.tolist()), spread=tuple(spread.tolist()))


def encoded_image(image: Image.Image) -> str:
    """Return an image, made small, as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return _url(small, "jpeg", quality=85, optimize=True)


def decoded_image(url: str) -> Image.Image:
    """Return what `encoded_image` made."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def encoded_layer(labels: npt.NDArray[np.int64]) -> str:
    """Return classes of pixels, made small, as the data URL of a translucent image.

    Args:
        labels: (H, W), -1 where the image stays clear.
    """
    height, width = labels.shape
    colored = np.where(labels < 0, 0, 1 + labels % _NUM_COLORS).astype(np.uint8)
    layer = Image.frombytes("P", (width, height), colored.tobytes())
    layer.putpalette([0, 0, 0, *(part for label in range(_NUM_COLORS) for part in color_of(label))])
    layer.thumbnail((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return _url(layer, "png", optimize=True, transparency=bytes([0] + [_OPACITY] * _NUM_COLORS))


def color_of(label: int) -> tuple[int, int, int]:
    """Return the color of a class, far from those of its neighbors: hues a golden angle apart."""
    red, green, blue = colorsys.hls_to_rgb(label % _NUM_COLORS * 0.618034 % 1, 0.62, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _url(image: Image.Image, kind: str, **options: Any) -> str:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
