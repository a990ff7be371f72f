"""Augmentation as data: what is done to each sample's view, drawn from counters and not from a generator's state.

The parameters of a view are a pure function of (seed, epoch, view, dense sample number) and of the image's size and
mean color. Every backend applies the same table, so a resume is exact, backends can be compared pixel by pixel, and a
preview shows what training sees.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.config import ViewConfig
from pipelines.plan.philox import philox4x64, uniform
from shards.ground.arrays import Indices

__all__ = [
    "KEY_VIEW",
    "LUMA",
    "NUM_PLACES",
    "QUERY_VIEW",
    "Stage",
    "ViewTable",
    "color_chain",
    "color_matrix",
    "draw_view",
    "hue_map",
    "table_of",
    "view_numbers",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

QUERY_VIEW, KEY_VIEW = 0, 1

LUMA: Floats = np.array([0.299, 0.587, 0.114])
"""Share of R, G and B in gray (ITU-R BT.601, as PIL and torchvision)."""

# Second word of the Philox key; pipelines.plan.order has 1 to 4.
_PURPOSE = 16

# A sample owns a fixed run of blocks of four words; what each word is for is part of the golden table.
_NUM_TRIES = 10
_BLOCKS = 9
_FLIP, _JITTER, _GRAYSCALE, _BLUR = range(4)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4, 8)
_ORDER, _SIGMA, _SOLARIZE = 8, 9, 10
_CROP_X, _CROP_Y = 12, 13
_TRIES = slice(14, 14 + 2 * _NUM_TRIES)

_TO_GRAY: Floats = np.tile(LUMA, (3, 1))

# Channels by size, largest first, in the six sectors of the hue circle from red over yellow and green.
_SECTORS: Indices = np.array([(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0), (2, 0, 1), (0, 2, 1)])
# Turns a vector by 90 degrees about the gray axis, in the plane across it.
_ACROSS_GRAY: Floats = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3)
_ONTO_GRAY: Floats = np.full((3, 3), 1 / 3)

_PERMUTATIONS: Indices = np.array(
    [(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
)


@dataclass(frozen=True, kw_only=True)
class ViewTable:
    """What is done to one view of n samples, in the order of the fields."""

    box: npt.NDArray[np.int32]
    """(n, 4) crop: x, y, width, height in pixels of the image; never empty, never outside."""
    flip: Bools
    """(n,) mirror left and right."""
    sigma: npt.NDArray[np.float32]
    """(n,) sigma of the Gaussian blur in pixels of the view; 0: none."""
    factors: Floats
    """(n, 4) of the jitter: brightness, contrast, saturation (1: unchanged), hue shift in turns (0: unchanged)."""
    jitter_order: Indices
    """(n, 4) in which the four are applied: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    grayscale: Bools
    """(n,) drop color."""
    grayscale_first: bool
    """Drop color before the jitter instead of after it."""
    matrix: npt.NDArray[np.float32] | None
    """(n, 3, 4) linear color map in 0..255 that takes the place of jitter and grayscale: `matrix[:, :3] @ rgb +
    matrix[:, 3]`, rounded and clamped. None: they are applied as torchvision does, one by one."""
    solarize: Bools
    """(n,) invert all values of 128 and above."""

    def rows(self, rows: slice) -> "ViewTable":
        """Return the same for some of the samples."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value: Any = getattr(self, field.name)
            # What is not an array holds of all samples.
            values[field.name] = value[rows] if np.ndim(value) else value
        return ViewTable(**values)

    def with_row(self, row: int, other: "ViewTable") -> "ViewTable":
        """Return the same with what another table of the same recipe, of one sample, does in place of a row."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value: Any = getattr(self, field.name)
            values[field.name] = value
            if np.ndim(value):
                values[field.name] = value.copy()
                values[field.name][row] = getattr(other, field.name)[0]
        return ViewTable(**values)


def draw_view(
    config: ViewConfig,
    *,
    seed: int,
    epoch: int | Indices,
    view: int | Indices,
    index: Indices,
    width: Indices,
    height: Indices,
    mean_rgb: Floats | None = None,
) -> ViewTable:
    """Draw the parameters of views for n samples: of one view, or of several in a call, which costs less.

    Args:
        config: the distributions.
        seed: 0 to 2**64 - 1.
        epoch: 0 and up; one, or (n,).
        view: QUERY_VIEW or KEY_VIEW; one, or (n,).
        index: (n,) dense sample numbers.
        width: (n,) of the images as decoded, in pixels.
        height: (n,).
        mean_rgb: (n, 3) mean color of each image in 0..255 (128 where unknown), to make the linear color map of it.
            None: no map, the colors are torchvision's.

    The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and of the blur and
    solarization of MoCo v2 and v3.
    """
    numbers = view_numbers(seed=seed, epoch=epoch, view=view, index=index)
    return table_of(config, numbers, width=width, height=height, mean_rgb=mean_rgb)


def view_numbers(*, seed: int, epoch: int | Indices, view: int | Indices, index: Indices) -> Floats:
    """Draw the random numbers of views, whatever their recipes, as (n, 36) in [0, 1); arguments as of draw_view."""
    blocks = np.asarray(index, dtype=np.uint64)[:, None] * np.uint64(_BLOCKS) + np.arange(_BLOCKS, dtype=np.uint64)
    epoch_of_row, view_of_row = (np.asarray(each, dtype=np.uint64).reshape(-1, 1) for each in (epoch, view))
    words = philox4x64((blocks, epoch_of_row, view_of_row, 0), (seed, _PURPOSE)).reshape(len(index), 4 * _BLOCKS)
    return uniform(words)


def table_of(
    config: ViewConfig, u: Floats, *, width: Indices, height: Indices, mean_rgb: Floats | None = None
) -> ViewTable:
    """Turn the random numbers of n views of one recipe, (n, 36), into their parameters; arguments as of draw_view."""
    jitter = u[:, _JITTER] < config.jitter_p
    factors = _factors(config, u, jitter)
    order = _PERMUTATIONS[(u[:, _ORDER] * len(_PERMUTATIONS)).astype(np.int64)]
    grayscale = u[:, _GRAYSCALE] < config.grayscale_p
    matrix = None
    if mean_rgb is not None:
        matrix = color_matrix(factors, order, grayscale, mean_rgb, grayscale_first=config.grayscale_first)
    low, high = config.blur_sigma
    sigma = np.where(u[:, _BLUR] < config.blur_p, low + (high - low) * u[:, _SIGMA], 0.0)
    return ViewTable(
        box=_crop_boxes(config, u, np.asarray(width), np.asarray(height)),
        flip=u[:, _FLIP] < config.flip_p,
        sigma=sigma.astype(np.float32),
        factors=factors,
        jitter_order=order,
        grayscale=grayscale,
        grayscale_first=config.grayscale_first,
        matrix=None if matrix is None else matrix.astype(np.float32),
        solarize=u[:, _SOLARIZE] < config.solarize_p,
    )


class Stage(IntEnum):
    """What a place of a color chain does to a pixel; the first four as in ViewTable.jitter_order."""

    BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, SOLARIZE, NOTHING = range(7)


NUM_PLACES = 7
"""Of a color chain: grayscale, the jitter's four, grayscale, solarize."""


def color_chain(table: ViewTable) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Lay out jitter, grayscale and solarize as one chain per sample, for kernels that apply it pixel by pixel.

    Returns:
        (n, NUM_PLACES) Stage of each place and (n, NUM_PLACES) its factor; of hue, the shift in 0..255 as torchvision
        has it for 8-bit images: 255ths of a turn, truncated. Jitter and grayscale are left out where `table.matrix`
        takes their place.
    """
    num = len(table.solarize)
    stages = np.full((num, NUM_PLACES), Stage.NOTHING, dtype=np.int32)
    factors = np.ones((num, NUM_PLACES), dtype=np.float32)
    stages[table.solarize, -1] = Stage.SOLARIZE
    if table.matrix is None:
        stages[table.grayscale, 0 if table.grayscale_first else 5] = Stage.GRAYSCALE
        in_order = np.take_along_axis(table.factors, table.jitter_order, axis=1)
        is_hue = table.jitter_order == Stage.HUE
        changes = in_order != np.where(is_hue, 0.0, 1.0)
        stages[:, 1:5] = np.where(changes, table.jitter_order, Stage.NOTHING)
        factors[:, 1:5] = np.where(is_hue, np.trunc(255 * in_order) % 256, in_order)
    return stages, factors


def color_matrix(
    factors: Floats, order: Indices, grayscale: Bools, mean_rgb: Floats, *, grayscale_first: bool
) -> Floats:
    """Chain brightness, contrast, saturation, hue and grayscale into one affine map of RGB.

    Args:
        factors: (n, 4) as in ViewTable.
        order: (n, 4) as in ViewTable.
        grayscale: (n,).
        mean_rgb: (n, 3) in 0..255; contrast pivots about its gray value, taken through the chain so far.
        grayscale_first: drop color before the other four instead of after them.

    Returns:
        (n, 3, 4) float64 in 0..255; the identity, bit for bit, where nothing is changed. Against torchvision's
        ColorJitter it differs by the pivot (the photo's mean instead of the crop's), by a linear hue, and by clamping
        once at the end instead of after each stage.
    """
    num = len(factors)
    chain = np.zeros((num, 3, 4))
    chain[:, :, :3] = np.eye(3)
    gray_linear = np.where(grayscale[:, None, None], _TO_GRAY, np.eye(3))
    if grayscale_first:
        chain = gray_linear @ chain
    brightness, contrast, saturation, hue = factors.T
    linear = np.empty((num, 4, 3, 3))
    linear[:, 0] = brightness[:, None, None] * np.eye(3)
    linear[:, 1] = contrast[:, None, None] * np.eye(3)
    linear[:, 2] = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * _TO_GRAY
    for place in range(4):
        stage = order[:, place]
        mean = (chain[:, :, :3] @ mean_rgb[:, :, None])[:, :, 0] + chain[:, :, 3]
        pivot = mean @ LUMA
        turned = np.flatnonzero(stage == 3)
        linear[turned, 3] = hue_map(hue[turned], mean[turned])
        chain = linear[np.arange(num), stage] @ chain
        chain[:, :, 3] += np.where(stage == 1, (1 - contrast) * pivot, 0.0)[:, None]
    return chain if grayscale_first else gray_linear @ chain


def hue_map(turns: Floats, mean_rgb: Floats) -> Floats:
    """Give a linear map near to a shift of hue in HSV, for images of a given mean color.

    Args:
        turns: (n,) red toward green where positive.
        mean_rgb: (n, 3).

    Returns:
        (n, 3, 3). A shift of hue in HSV is linear within one sector of the hue circle. Where the mean color is
        saturated and, before and after the shift, away from a sector's edge, most pixels lie in its sector: its map is
        taken. Where it is gray or on an edge the map is a rotation about the gray axis, in between a mixture: so the
        map is continuous in both arguments. Both keep gray. A shift by 0 is the identity, bit for bit.
    """
    high, low = mean_rgb.max(axis=1), mean_rgb.min(axis=1)
    # Black is gray: below one level there is no hue to keep, and the map stays continuous down to 0.
    saturation = (high - low) / np.maximum(high, 1.0)
    sector_map, from_edge = _sector_map(turns, mean_rgb)
    weight = np.minimum(1.0, np.minimum(4 * saturation, 20 * from_edge))[:, None, None]
    mixed = weight * sector_map + (1 - weight) * _gray_axis_rotation(turns)
    return np.where(turns[:, None, None] == 0, np.eye(3), mixed)


def _gray_axis_rotation(turns: Floats) -> Floats:
    angle = 2 * np.pi * turns[:, None, None]
    return _ONTO_GRAY + np.cos(angle) * (np.eye(3) - _ONTO_GRAY) + np.sin(angle) * _ACROSS_GRAY


def _sector_map(turns: Floats, mean_rgb: Floats) -> tuple[Floats, Floats]:
    """Shift hue in HSV, as the linear map that holds between the mean's sector before and after the shift.

    Returns:
        (n, 3, 3) and (n,) how far the mean's hue, before or after, is from the nearest edge, in sixths of a turn.
    """
    rows = np.arange(len(turns))
    ranked = np.argsort(-mean_rgb, axis=1, kind="stable")
    sector = (ranked[:, None, :] == _SECTORS).all(axis=2).argmax(axis=1)
    channels: Floats = np.eye(3, dtype=np.float64)
    largest: Floats = channels[_SECTORS[sector, 0]]
    middle: Floats = channels[_SECTORS[sector, 1]]
    smallest: Floats = channels[_SECTORS[sector, 2]]
    chroma = largest - smallest
    # Hue times chroma, with hue in sixths of a turn, is linear in RGB within a sector; so is what follows from it.
    ascending = (sector % 2 == 0)[:, None]
    rise = middle - smallest
    begin: Floats = sector[:, None].astype(np.float64)
    hue_chroma: Floats = np.where(ascending, begin * chroma + rise, (begin + 1) * chroma - rise)
    shifted = hue_chroma + 6 * turns[:, None] * chroma
    means: Floats = np.take_along_axis(mean_rgb, ranked, axis=1)
    # From differences, which are exact where channels are nearly equal: 0 to 1 for the least chroma, too.
    part: Floats = (means[:, 1] - means[:, 2]) / np.maximum(means[:, 0] - means[:, 2], np.finfo(np.float64).tiny)
    before: Floats = sector + np.where(sector % 2 == 0, part, 1 - part)
    after = before + 6 * turns
    target = np.floor(after).astype(np.int64)
    ascending = (target % 2 == 0)[:, None]
    begin = target[:, None].astype(np.float64)
    rise = np.where(ascending, shifted - begin * chroma, (begin + 1) * chroma - shifted)
    result: Floats = np.empty((len(turns), 3, 3))
    places = _SECTORS[target % 6]
    for rank, row in enumerate((largest, smallest + rise, smallest)):
        result[rows, places[:, rank]] = row
    return result, np.minimum(np.abs(before - np.rint(before)), np.abs(after - np.rint(after)))


def _factors(config: ViewConfig, u: Floats, jitter: Bools) -> Floats:
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    low = np.maximum(0.0, 1 - strengths)
    factors = np.empty((len(u), 4))
    factors[:, :3] = low + (1 + strengths - low) * u[:, [_BRIGHTNESS, _CONTRAST, _SATURATION]]
    factors[:, 3] = config.hue * (2 * u[:, _HUE] - 1)
    factors[~jitter] = (1.0, 1.0, 1.0, 0.0)
    return factors


def _crop_boxes(config: ViewConfig, u: Floats, width: Indices, height: Indices) -> npt.NDArray[np.int32]:
    """Do as torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest central crop."""
    area = (width * height).astype(np.float64)
    tries = u[:, _TRIES].reshape(len(u), _NUM_TRIES, 2)
    low, high = config.crop_scale
    target = area[:, None] * (low + (high - low) * tries[:, :, 0])
    log_low, log_high = np.log(config.crop_ratio)
    ratio = np.exp(log_low + (log_high - log_low) * tries[:, :, 1])
    w, h = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(u))
    fitted = fits[rows, first]

    least, most = config.crop_ratio
    image_ratio = width / height
    tall, wide = image_ratio < least, image_ratio > most
    # At least one pixel: an image of one row would round to none.
    central_w = np.where(wide, np.maximum(1, np.rint(height * most)), width)
    central_h = np.where(tall, np.maximum(1, np.rint(width / least)), height)
    box_w = np.where(fitted, w[rows, first], central_w)
    box_h = np.where(fitted, h[rows, first], central_h)
    x = np.where(fitted, np.floor(u[:, _CROP_X] * (width - box_w + 1)), (width - box_w) // 2)
    y = np.where(fitted, np.floor(u[:, _CROP_Y] * (height - box_h + 1)), (height - box_h) // 2)
    return np.stack((x, y, box_w, box_h), axis=1).astype(np.int32)
