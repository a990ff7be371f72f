"""Pictures in the page: images, and the views that a run trains on."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.config import Config
from pipelines.preview import draw
from shards.sets import open_set

__all__ = ["Picture", "Sample", "show_views", "to_picture"]

_LONGEST_SIDE = 256  # of a picture in the page, in pixels
_PNG_PIXELS = 64 * 64  # up to here a picture is kept exact


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Image in the page."""

    url: str
    width: int
    height: int
    """Pixels of the original image; the page may hold a smaller one."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Training sample: the original with its crops marked, and the views made from them."""

    index: int
    original: Picture
    boxes: tuple[tuple[int, int, int, int], ...]
    views: tuple[Picture, ...]


def show_views(config: Config, *, epoch: int, num_samples: int) -> list[Sample]:
    """Make the views of some samples, evenly spread over the set, exactly as training sees them in an epoch."""
    shards = open_set(config.data.shards)
    total = shards.num_samples
    chosen = np.unique(np.linspace(0, total - 1, min(num_samples, total)).round().astype(int)).tolist()
    views = config.method.views_of(config.views)
    previews = draw(shards, views, seed=config.run.seed, epoch=epoch, indices=chosen)
    return [
        Sample(
            index=preview.index,
            original=to_picture(preview.original),
            boxes=preview.boxes,
            views=tuple(to_picture(view) for view in preview.views),
        )
        for preview in previews
    ]


def to_picture(pixels: npt.NDArray[np.uint8]) -> Picture:
    """Encode pixels (H, W, 3) as a data URL: small images as PNG, which is exact, others as JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    width, height = image.size
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    kind = "png" if image.width * image.height <= _PNG_PIXELS else "jpeg"
    image.save(out, kind, optimize=True, quality=85)
    url = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    return Picture(url=url, width=width, height=height)
