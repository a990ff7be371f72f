"""Common corruptions of images (Hendrycks & Dietterich 2019), in the strengths that the published sets were made with.

What is drawn for an image depends on seed, sample, kind and severity alone. Frost was blended with photographs, which
are not ours to ship: here it is drawn, with their brightness, so its figures are not those of the published sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from math import cos, sin, tau
from typing import Any
from zlib import crc32

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter1d, map_coordinates

from moco_fast.evaluation.strengths import SIDES, STRENGTHS, Strengths

__all__ = ["KINDS", "Corruption"]

Pixels = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
_GRAY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """A kind at a severity, as a function of image and sample number."""

    kind: str
    severity: int
    """1 to 5."""
    strengths: Strengths
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.severity}"

    def __call__(self, image: Bytes, sample: int) -> Bytes:
        """Corrupt an image.

        Args:
            image: (S, S, 3) uint8, RGB.
            sample: its number, which decides what is drawn.

        Returns:
            (S, S, 3) uint8. Fractions of a level are cut off, and with ImageNet's strengths the image passes through
            JPEG of quality 85, as in the published sets.
        """
        kind, strengths, as_files = KINDS[self.kind], STRENGTHS[self.kind][self.strengths], self.strengths != "cifar"
        rng = np.random.default_rng((self.seed, sample, crc32(self.kind.encode()), self.severity))
        pixels = image.astype(np.float32) / 255
        corrupted = kind(_Canvas(pixels, rng, self.strengths), strengths[self.severity - 1])
        # A thousandth of a level, so that rounding in float32 does not cut off what float64 would keep.
        levels = (np.clip(corrupted, 0, 1) * 255 + 1e-3).astype(np.uint8)
        return _through_jpeg(levels, 85) if as_files else levels


@dataclass(frozen=True)
class _Canvas:
    """What a kind is given."""

    pixels: Pixels
    """(S, S, 3) in 0..1."""
    rng: np.random.Generator
    strengths: Strengths

    @property
    def side(self) -> int:
        return len(self.pixels)

    @property
    def scale(self) -> float:
        """Side as a share of the published one: for displacements that are given as shares of the side."""
        return self.side / SIDES[self.strengths]

    def normal(self, deviation: float, *, mean: float = 0.0, shape: tuple[int, ...] | None = None) -> Pixels:
        drawn = self.rng.standard_normal(self.pixels.shape if shape is None else shape, dtype=np.float32)
        return drawn * np.float32(deviation) + np.float32(mean)


# Noise -----------------------------------------------------------------------------------------------------------


def _gaussian_noise(canvas: _Canvas, deviation: float) -> Pixels:
    return canvas.pixels + canvas.normal(deviation)


def _shot_noise(canvas: _Canvas, photons: float) -> Pixels:
    return (canvas.rng.poisson(canvas.pixels * photons) / photons).astype(np.float32)


def _impulse_noise(canvas: _Canvas, share: float) -> Pixels:
    hit, white = (canvas.rng.random(canvas.pixels.shape, dtype=np.float32) for _ in range(2))
    return np.where(hit <= share, (white <= 0.5).astype(np.float32), canvas.pixels)


def _speckle_noise(canvas: _Canvas, deviation: float) -> Pixels:
    return canvas.pixels * (1 + canvas.normal(deviation))


# Blur ------------------------------------------------------------------------------------------------------------


def _smoothed(pixels: Pixels, sigma: float) -> Pixels:
    """Blur by a Gaussian, cut at four deviations, edges repeated."""
    radius = int(4 * sigma + 0.5)
    return cv2.GaussianBlur(pixels, (2 * radius + 1, 2 * radius + 1), sigma, borderType=cv2.BORDER_REPLICATE)


def _gaussian_blur(canvas: _Canvas, sigma: float) -> Pixels:
    return _smoothed(canvas.pixels, sigma)


def _defocus_blur(canvas: _Canvas, strength: tuple[float, float]) -> Pixels:
    radius, smooth = strength
    reach = 8 if radius <= 8 else int(radius)
    place = np.arange(-reach, reach + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    kernel = cv2.GaussianBlur(disk / disk.sum(), (side, side), smooth)
    return cv2.filter2D(canvas.pixels, -1, kernel)


def _glass_blur(canvas: _Canvas, strength: tuple[float, int, int]) -> Pixels:
    """Blur, let every pixel take the place of a near one, and blur again.

    Pixels are copied, from the lower right to the upper left. The published code exchanges them, but through views of
    one array, so that what is overwritten is lost; the published images show that.
    """
    sigma, reach, rounds = strength
    side = canvas.side
    colors = (_smoothed(canvas.pixels, sigma) * 255 + 1e-3).astype(np.uint8)
    places = np.arange(side - reach, reach, -1)
    to = (places[:, None] * side + places).ravel()
    order = np.arange(side * side).tolist()
    for _ in range(rounds):
        down, right = canvas.rng.integers(-reach, reach, size=(2, len(to)))
        for target, source in zip(to.tolist(), (to + down * side + right).tolist(), strict=True):
            order[target] = order[source]
    moved = colors.reshape(-1, 3)[order].reshape(colors.shape)
    return _smoothed(moved.astype(np.float32) / 255, sigma)


def _motion_blur(canvas: _Canvas, strength: tuple[int, float]) -> Pixels:
    radius, sigma = strength
    return _moved(canvas.pixels, radius, sigma, angle=canvas.rng.uniform(-45, 45))


def _moved(pixels: Pixels, radius: int, sigma: float, *, angle: float) -> Pixels:
    """Blur along a line, to one side, with half a Gaussian: ImageMagick's MotionBlurImage, edges repeated."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    turn = np.deg2rad(angle)
    downs, rights = (np.ceil(steps * along - 0.5).astype(int) for along in (np.sin(turn), np.cos(turn)))
    around = 2 * radius + 1
    height, width = pixels.shape[:2]
    wide = np.pad(pixels, ((around, around), (around, around), *[(0, 0)] * (pixels.ndim - 2)), mode="edge")
    total = np.zeros_like(pixels)
    for weight, down, right in zip((weights / weights.sum()).astype(np.float32), downs, rights, strict=True):
        top, left = around + down, around + right
        total += weight * wide[top : top + height, left : left + width]
    return total


def _zoom_blur(canvas: _Canvas, factors: tuple[float, float]) -> Pixels:
    """Average the image with itself at growing zoom, from 1 to below an end by a step."""
    end, step = factors
    zooms = np.arange(1, end, step)
    total = canvas.pixels.copy()
    for zoom in zooms.tolist():
        total += _zoomed(canvas.pixels, zoom)
    return total / (len(zooms) + 1)


def _zoomed(pixels: Pixels, factor: float) -> Pixels:
    """Zoom into the middle of a square image, linearly, corners on corners."""
    low, high, share = _zoom_places(len(pixels), factor)
    for axis in (0, 1):
        weight = share.reshape((-1,) + (1,) * (pixels.ndim - 1 - axis))
        first = pixels.take(low, axis=axis)
        pixels = first + (pixels.take(high, axis=axis) - first) * weight
    return pixels


@cache
def _zoom_places(side: int, factor: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Pixels]:
    """Return, for each place of a row, the places before and behind that it lies between, and how far it is."""
    cut = int(np.ceil(side / factor))
    enlarged = round(cut * factor)
    where = np.arange(enlarged) * ((cut - 1) / max(1, enlarged - 1))
    trim = (enlarged - side) // 2
    where = where[trim : trim + side]
    low = np.minimum(where.astype(np.intp), cut - 1)
    first = (side - cut) // 2
    return first + low, first + np.minimum(low + 1, cut - 1), (where - low).astype(np.float32)


# Weather ---------------------------------------------------------------------------------------------------------


def _snow(canvas: _Canvas, strength: tuple[float, float, float, float, int, float, float]) -> Pixels:
    mean, deviation, zoom, threshold, radius, sigma, kept = strength
    side = canvas.side
    flakes = _zoomed(canvas.normal(deviation, mean=mean, shape=(side, side)), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = (flakes * 255).astype(np.uint8).astype(np.float32)
    flakes = np.round(_moved(flakes, radius, sigma, angle=canvas.rng.uniform(-135, -45)))[..., None] / np.float32(255)
    bright = np.maximum(canvas.pixels, (canvas.pixels @ _GRAY)[..., None] * 1.5 + 0.5)
    return kept * canvas.pixels + (1 - kept) * bright + flakes + flakes[::-1, ::-1]


def _frost(canvas: _Canvas, strength: tuple[float, float]) -> Pixels:
    kept, added = strength
    return kept * canvas.pixels + added * _ice(canvas)


# Mean colors of the darkest and the lightest of the pictures that the published sets were made with, and the deviation
# within one, in levels.
_DARK, _LIGHT, _DEVIATION = np.array([71, 95, 105]), np.array([201, 205, 214]), 30
_PICTURE_SCALE = {"imagenet": 1.0, "tiny-imagenet": 0.3, "cifar": 0.2}


def _ice(canvas: _Canvas) -> Pixels:
    """Draw needles of ice over clouds: (S, S, 3) in 0..1."""
    rng = canvas.rng
    side = round(canvas.side / _PICTURE_SCALE[canvas.strengths])
    needles = np.zeros((side, side), dtype=np.uint8)
    for x, y, turn, length, light in rng.random((side * side // 120, 5)).tolist():
        reach = 8 + 60 * length**3
        ends = (x * side, y * side), (x * side + reach * cos(tau * turn), y * side + reach * sin(tau * turn))
        # In sixteenths of a pixel.
        begin, end = ((round(16 * right), round(16 * down)) for right, down in ends)
        cv2.line(needles, begin, end, 255 * light, 1, cv2.LINE_AA, 4)
    texture = _standard(_smoothed(needles.astype(np.float32), 0.7)) + _standard(_plasma(rng, side, 1.6))
    color = _DARK + (_LIGHT - _DARK) * rng.random()
    picture = (color + _DEVIATION * _standard(texture)[..., None]).clip(0, 255).astype(np.float32) / 255
    return cv2.resize(picture, (canvas.side, canvas.side), interpolation=cv2.INTER_AREA)


def _standard(values: Pixels) -> Pixels:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _fog(canvas: _Canvas, strength: tuple[float, float]) -> Pixels:
    thickness, decay = strength
    brightest = canvas.pixels.max()
    veiled = canvas.pixels + thickness * _plasma(canvas.rng, canvas.side, decay)[..., None]
    return veiled * (brightest / (brightest + thickness))


def _plasma(rng: np.random.Generator, side: int, decay: float) -> Pixels:
    """Draw a height map by diamonds and squares on a torus: (side, side) in 0..1, cut from a power of two."""
    full = 1 << (side - 1).bit_length()
    heights = np.zeros((full, full))
    step, reach = full, 1.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        between = corners + np.roll(corners, -1, axis=0)
        middles = (between + np.roll(between, -1, axis=1)) / 4
        middles += rng.uniform(-reach, reach, middles.shape)
        heights[half::step, half::step] = middles
        for axis, edges in ((0, np.s_[::step, half::step]), (1, np.s_[half::step, ::step])):
            around = middles + np.roll(middles, 1, axis=axis) + corners + np.roll(corners, -1, axis=1 - axis)
            heights[edges] = around / 4 + rng.uniform(-reach, reach, middles.shape)
        step, reach = half, reach / decay**2
    heights -= heights.min()
    return (heights / max(heights.max(), 1e-12))[:side, :side].astype(np.float32)


def _brightness(canvas: _Canvas, added: float) -> Pixels:
    """Add to the value of hue, saturation and value: every color grows by the same factor."""
    value = canvas.pixels.max(axis=2, keepdims=True)
    brighter = np.minimum(value + np.float32(added), 1)
    return np.where(value > 0, canvas.pixels * (brighter / np.where(value > 0, value, 1)), brighter)


# Digital ---------------------------------------------------------------------------------------------------------


def _contrast(canvas: _Canvas, factor: float) -> Pixels:
    means = canvas.pixels.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return (canvas.pixels - means) * np.float32(factor) + means


def _elastic_transform(canvas: _Canvas, strength: tuple[float, float, float]) -> Pixels:
    """Move three corners, then every place, each by shares of the published side."""
    reach, sigma, corner_reach = (each * canvas.scale for each in strength)
    side, rng = canvas.side, canvas.rng
    middle, third = side // 2, side // 3
    corners = np.array([[1, 1], [1, -1], [-1, -1]], dtype=np.float32) * third + middle
    moved = corners + rng.uniform(-corner_reach, corner_reach, corners.shape).astype(np.float32)
    matrix = cv2.getAffineTransform(corners, moved)
    pixels = cv2.warpAffine(canvas.pixels, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    if reach == 0:
        return pixels
    smooth = _reflecting_gaussian(side, sigma)
    places = [
        np.expand_dims(np.arange(side), 1 - axis) + reach * (smooth @ rng.uniform(-1, 1, (side, side)) @ smooth.T)
        for axis in (1, 0)
    ]
    return np.stack(
        [map_coordinates(pixels[..., channel], places[::-1], order=1, mode="reflect") for channel in range(3)], axis=2
    )


@cache
def _reflecting_gaussian(side: int, sigma: float) -> npt.NDArray[np.float64]:
    """Return the matrix of a Gaussian blur of a column, cut at three deviations, edges reflected.

    A published deviation is three quarters of the side: as a filter it would be a hundred times as much work.
    """
    return gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect", truncate=3)


def _pixelate(canvas: _Canvas, share: float) -> Pixels:
    side = canvas.side
    few = max(1, int(side * share))
    image = Image.fromarray((canvas.pixels * 255).round().astype(np.uint8))
    small = image.resize((few, few), Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255


def _jpeg_compression(canvas: _Canvas, quality: int) -> Pixels:
    return _through_jpeg((canvas.pixels * 255).round().astype(np.uint8), quality).astype(np.float32) / 255


def _through_jpeg(levels: Bytes, quality: int) -> Bytes:
    file = BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _saturate(canvas: _Canvas, strength: tuple[float, float]) -> Pixels:
    """Scale the saturation and add to it; gray counts as red of no saturation."""
    factor, added = strength
    value, least = canvas.pixels.max(axis=2, keepdims=True), canvas.pixels.min(axis=2, keepdims=True)
    saturation = (value - least) / np.where(value > 0, value, 1)
    wanted = np.clip(saturation * np.float32(factor) + np.float32(added), 0, 1)
    colored = value - (value - canvas.pixels) * (wanted / np.where(saturation > 0, saturation, 1))
    red = value * np.concatenate([np.ones_like(wanted), 1 - wanted, 1 - wanted], axis=2)
    return np.where(saturation > 0, colored, red)


_WATER, _MUD = np.array([175, 238, 238], dtype=np.float32) / 255, np.array([63, 42, 20], dtype=np.float32) / 255


def _spatter(canvas: _Canvas, strength: tuple[float, float, float, float, float, int]) -> Pixels:
    mean, deviation, sigma, threshold, weight, is_mud = strength
    liquid = _smoothed(canvas.normal(deviation, mean=mean, shape=(canvas.side, canvas.side)), sigma)
    if is_mud:
        mud = _smoothed((liquid > threshold).astype(np.float32), weight)[..., None]
        mud = np.where(mud < 0.8, 0, mud)
        return canvas.pixels * (1 - mud) + _MUD * mud
    levels = (np.where(liquid < threshold, 0, liquid).clip(0, 1) * 255).astype(np.uint8)
    light = levels * _edge_light(levels)
    return canvas.pixels + weight * (light / max(float(light.max()), 1e-6))[..., None] * _WATER


def _edge_light(levels: Bytes) -> Pixels:
    """Return how drops shine: by their distance from an edge, lit from one side."""
    edges: Any = cv2.Canny(levels, 50, 150)
    near: Any = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    near = cv2.equalizeHist(cv2.blur(near, (3, 3)).astype(np.uint8))
    lit = cv2.filter2D(near, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    return cv2.blur(lit, (3, 3)).astype(np.float32)


Kind = Callable[[_Canvas, Any], Pixels]

KINDS: dict[str, Kind] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
