"""Corruptions against plain statements of their formulas, in float64 and pixel by pixel."""

import colorsys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates, zoom

from moco_fast.evaluation.corrupting import Workers, corrupt_images, read_images
from moco_fast.evaluation.corruptions import KINDS, Corruption, _Canvas
from moco_fast.evaluation.strengths import ALEXNET, COMMON, EXTRA, STRENGTHS, Strengths, strengths_for

SIDE = 16
STRENGTH_NAMES = get_args(Strengths)
RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"} | {
    "elastic_transform",
    "speckle_noise",
    "spatter",
}


def picture(side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Smooth colors with an edge, noise and a gray, a black and a white corner."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    colors = np.stack([rows, columns, 0.5 + 0.5 * np.sin(6 * rows + 3 * columns)], axis=2)
    colors[:, side // 2 :] *= 0.6
    colors = (255 * colors + rng.normal(0, 8, colors.shape)).clip(0, 255).astype(np.uint8)
    colors[:2, :2], colors[:2, -2:], colors[-2:, :2] = 128, 0, 255
    return colors


# Plain statements --------------------------------------------------------------------------------------------------


def clamped(x: np.ndarray, row: int, column: int) -> np.ndarray:
    return x[min(max(row, 0), len(x) - 1), min(max(column, 0), x.shape[1] - 1)]


def mirrored(place: int, side: int) -> int:
    """Reflect without repeating the edge."""
    place = abs(place) % (2 * side - 2)
    return place if place < side else 2 * side - 2 - place


def each_pixel(x: np.ndarray, function: Callable[[int, int], Any]) -> np.ndarray:
    return np.array([[function(row, column) for column in range(x.shape[1])] for row in range(len(x))])


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma + 0.5)
    weights = [np.exp(-(step**2) / (2 * sigma**2)) for step in range(-reach, reach + 1)]
    weights = np.array(weights) / sum(weights)
    steps = range(-reach, reach + 1)
    down = each_pixel(x, lambda r, c: sum(w * clamped(x, r + s, c) for w, s in zip(weights, steps, strict=True)))
    return each_pixel(x, lambda r, c: sum(w * clamped(down, r, c + s) for w, s in zip(weights, steps, strict=True)))


def moved(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    weights = np.array([np.exp(-(step**2) / (2 * sigma**2)) for step in range(2 * radius + 1)])
    weights /= weights.sum()
    down, right = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    places = [(int(np.ceil(s * down - 0.5)), int(np.ceil(s * right - 0.5))) for s in range(2 * radius + 1)]
    return each_pixel(
        x, lambda r, c: sum(w * clamped(x, r + d, c + a) for w, (d, a) in zip(weights, places, strict=True))
    )


def zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    side = len(x)
    cut = int(np.ceil(side / factor))
    top = (side - cut) // 2
    large = zoom(x[top : top + cut, top : top + cut], (factor, factor, *[1] * (x.ndim - 2)), order=1)
    trim = (len(large) - side) // 2
    return large[trim : trim + side, trim : trim + side]


def plasma(rng: np.random.Generator, side: int, decay: float) -> np.ndarray:
    full = 2 ** int(np.ceil(np.log2(side)))
    heights, step, wibble = np.zeros((full, full)), full, 1.0
    while step >= 2:
        half, count = step // 2, full // step
        noise = rng.uniform(-(wibble**2), wibble**2, (count, count))
        for i in range(count):
            for j in range(count):
                corners = [heights[(i + a) % count * step, (j + b) % count * step] for a in (0, 1) for b in (0, 1)]
                heights[i * step + half, j * step + half] = sum(corners) / 4 + noise[i, j]
        for place in ((0, half), (half, 0)):
            noise = rng.uniform(-(wibble**2), wibble**2, (count, count))
            for i in range(count):
                for j in range(count):
                    row, column = i * step + place[0], j * step + place[1]
                    around = [(row - half, column), (row + half, column), (row, column - half), (row, column + half)]
                    heights[row, column] = sum(heights[r % full, c % full] for r, c in around) / 4 + noise[i, j]
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return (heights / heights.max())[:side, :side]


def normals(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(np.float64)


def impulse_noise(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    hit, white = rng.random(x.shape, dtype=np.float32), rng.random(x.shape, dtype=np.float32)
    found = x.copy()
    for place in np.ndindex(x.shape):
        if hit[place] <= share:
            found[place] = 1 if white[place] <= 0.5 else 0
    return found


def defocus_blur(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, float]) -> np.ndarray:
    radius, smooth = strength
    places = range(-8, 9)
    disk = np.array([[float(r * r + c * c <= radius**2) for c in places] for r in places])
    disk /= disk.sum()
    weights = np.array([np.exp(-(step**2) / (2 * smooth**2)) for step in (-1, 0, 1)])
    weights = np.outer(weights, weights) / weights.sum() ** 2
    kernel = each_pixel(
        disk,
        lambda r, c: sum(
            weights[a + 1, b + 1] * disk[mirrored(r + a, 17), mirrored(c + b, 17)]
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
        ),
    )
    side = len(x)
    return each_pixel(
        x,
        lambda r, c: sum(
            kernel[a + 8, b + 8] * x[mirrored(r + a, side), mirrored(c + b, side)] for a in places for b in places
        ),
    )


def glass_blur(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, int, int]) -> np.ndarray:
    sigma, reach, rounds = strength
    found = np.floor(blurred(x, sigma) * 255 + 1e-3)
    span = range(len(x) - reach, reach, -1)
    for _ in range(rounds):
        steps = iter(rng.integers(-reach, reach, size=(2, len(span) ** 2)).T.tolist())
        for row in span:
            for column in span:
                down, right = next(steps)
                found[row, column] = found[row + down, column + right]
    return blurred(found / 255, sigma)


def snow(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, ...]) -> np.ndarray:
    mean, deviation, factor, threshold, radius, sigma, kept = strength
    layer = zoomed(normals(rng, x.shape[:2]) * deviation + mean, factor)
    layer = np.floor(np.where(layer < threshold, 0, layer).clip(0, 1) * 255)
    layer = np.round(moved(layer, int(radius), sigma, rng.uniform(-135, -45)))[..., None] / 255
    gray = (x @ [0.299, 0.587, 0.114])[..., None]
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * gray + 0.5) + layer + np.rot90(layer, 2)


def fog(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, float]) -> np.ndarray:
    thickness, decay = strength
    return (x + thickness * plasma(rng, len(x), decay)[..., None]) * x.max() / (x.max() + thickness)


def brightness(x: np.ndarray, rng: np.random.Generator, added: float) -> np.ndarray:
    def brighter(row: int, column: int) -> Any:
        hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
        return colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))

    return each_pixel(x, brighter)


def saturate(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, float]) -> np.ndarray:
    def colored(row: int, column: int) -> Any:
        hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
        return colorsys.hsv_to_rgb(hue, min(max(saturation * strength[0] + strength[1], 0), 1), value)

    return each_pixel(x, colored)


def elastic_transform(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, ...]) -> np.ndarray:
    alpha, sigma, corner = (each * SIDE / 32 for each in strength)
    middle, third = SIDE // 2, SIDE // 3
    before = np.array([[middle + third, middle + third], [middle + third, middle - third], [middle - third] * 2])
    after = before + rng.uniform(-corner, corner, before.shape)
    # (x, y, 1) of the result to (x, y) of the image.
    back = np.linalg.solve(np.c_[after, np.ones(3)], before).T
    matrix = back[[1, 0]][:, [1, 0]]
    warped = np.stack(
        [affine_transform(x[..., i], matrix, back[[1, 0], 2], order=1, mode="mirror") for i in range(3)], axis=2
    )
    if alpha == 0:
        return warped
    right, down = (
        alpha * gaussian_filter(rng.uniform(-1, 1, x.shape[:2]), sigma, mode="reflect", truncate=3) for _ in range(2)
    )
    rows, columns, channels = np.mgrid[:SIDE, :SIDE, :3]
    return map_coordinates(
        warped, [rows + down[..., None], columns + right[..., None], channels], order=1, mode="reflect"
    )


def mud(x: np.ndarray, rng: np.random.Generator, strength: tuple[float, ...]) -> np.ndarray:
    mean, deviation, sigma, threshold, smooth, _ = strength
    liquid = blurred(normals(rng, x.shape[:2]) * deviation + mean, sigma)
    layer = blurred((liquid > threshold).astype(float), smooth)[..., None]
    layer[layer < 0.8] = 0
    return x * (1 - layer) + layer * np.array([63, 42, 20]) / 255


PLAIN: dict[str, Callable[..., np.ndarray]] = {
    "gaussian_noise": lambda x, rng, s: x + s * normals(rng, x.shape),
    "shot_noise": lambda x, rng, s: rng.poisson(x.astype(np.float32) * s) / s,
    "impulse_noise": impulse_noise,
    "speckle_noise": lambda x, rng, s: x + x * s * normals(rng, x.shape),
    "gaussian_blur": lambda x, rng, s: blurred(x, s),
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": lambda x, rng, s: moved(x, *s, rng.uniform(-45, 45)),
    "zoom_blur": lambda x, rng, s: (
        (x + sum(zoomed(x, factor) for factor in np.arange(1, *s))) / (len(np.arange(1, *s)) + 1)
    ),
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": lambda x, rng, s: (x - x.mean(axis=(0, 1))) * s + x.mean(axis=(0, 1)),
    "elastic_transform": elastic_transform,
    "saturate": saturate,
}


def both(kind: str, strength: Any, plain: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pixels = picture().astype(np.float32) / 255
    ours = KINDS[kind](_Canvas(pixels, np.random.default_rng(3), "cifar"), strength)
    return ours, plain(pixels.astype(np.float64), np.random.default_rng(3), strength)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_kind_is_its_formula(kind: str, severity: int) -> None:
    ours, plain = both(kind, STRENGTHS[kind]["cifar"][severity - 1], PLAIN[kind])
    # OpenCV's affine map rounds to 32nds of a pixel.
    tolerance = 0.02 if kind == "elastic_transform" else 2e-4
    far = np.abs(ours - plain) > tolerance
    # Flakes are rounded to levels: some fall to the other side.
    assert far.mean() < (0.02 if kind in ("snow", "elastic_transform") else 1e-9)


def test_spatter_is_mud_by_its_formula_or_water_that_brightens() -> None:
    ours, plain = both("spatter", STRENGTHS["spatter"]["cifar"][4], mud)
    np.testing.assert_allclose(ours, plain, atol=2e-4)
    pixels = picture().astype(np.float32) / 255
    wet = KINDS["spatter"](_Canvas(pixels, np.random.default_rng(3), "cifar"), STRENGTHS["spatter"]["cifar"][2])
    added = wet - pixels
    assert added.min() >= 0
    assert 0.05 < (added > 0).mean() < 0.95
    # Pale turquoise, and the brightest drop as bright as asked.
    np.testing.assert_allclose(added.reshape(-1, 3).max(axis=0), 0.5 * np.array([175, 238, 238]) / 255, rtol=1e-3)


def test_frost_adds_ice_as_bright_as_the_published_pictures() -> None:
    black = np.zeros((64, 64, 3), dtype=np.float32)
    for kept, added in STRENGTHS["frost"]["imagenet"]:
        ices = [
            KINDS["frost"](_Canvas(black, np.random.default_rng(n), "imagenet"), (kept, added)) / added
            for n in range(12)
        ]
        means = np.array([ice.mean() for ice in ices]) * 255
        # Those of the six pictures reach from 90 to 207 levels, their deviations from 20 to 45.
        assert 80 < means.min() < 130 < 160 < means.max() < 215
        assert all(18 < 255 * ice.std(axis=(0, 1)).mean() < 45 for ice in ices)
        grey = KINDS["frost"](_Canvas(black + 0.5, np.random.default_rng(0), "imagenet"), (kept, added))
        np.testing.assert_allclose(grey, 0.5 * kept + added * ices[0], atol=1e-6)


def test_pixelate_averages_blocks() -> None:
    pixels = picture().astype(np.float32) / 255
    found = KINDS["pixelate"](_Canvas(pixels, np.random.default_rng(0), "cifar"), 0.5)
    blocks = pixels.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(found - blocks).max() <= 1.01 / 255  # Pillow rounds rows, then columns


# All kinds ---------------------------------------------------------------------------------------------------------


def test_every_kind_has_its_strengths_and_alexnet_an_error_on_the_common_ones() -> None:
    assert tuple(KINDS) == (*COMMON, *EXTRA)
    assert set(STRENGTHS) == set(KINDS)
    assert all(
        set(of) == set(STRENGTH_NAMES) and all(len(each) == 5 for each in of.values()) for of in STRENGTHS.values()
    )
    assert tuple(ALEXNET) == COMMON
    assert [strengths_for(size) for size in (28, 32, 64, 96, 160, 224, 384)] == [
        "cifar",
        "cifar",
        "tiny-imagenet",
        "tiny-imagenet",
        "imagenet",
        "imagenet",
        "imagenet",
    ]


@pytest.mark.parametrize("strengths", STRENGTH_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_depends_on_seed_and_sample_alone(kind: str, strengths: Strengths) -> None:
    image = picture(33)
    for severity in range(1, 6):
        corruption = Corruption(kind=kind, severity=severity, strengths=strengths)
        found = corruption(image, 7)
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        assert np.array_equal(found, corruption(image, 7))
        others = corruption(image, 8), Corruption(kind=kind, severity=severity, strengths=strengths, seed=1)(image, 7)
        if severity == 5:
            assert all((not np.array_equal(found, other)) == (kind in RANDOM) for other in others)
            assert not np.array_equal(found, image)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_one_color_are_corrupted_without_a_warning(kind: str, level: int) -> None:
    image = np.full((8, 8, 3), level, dtype=np.uint8)
    for severity in (1, 5):
        assert Corruption(kind=kind, severity=severity, strengths="cifar")(image, 0).shape == image.shape


@pytest.mark.parametrize(
    "kind", ["gaussian_noise", "shot_noise", "contrast", "brightness", "gaussian_blur", "jpeg_compression"]
)
def test_severity_grows(kind: str) -> None:
    image = picture(48)
    for strengths in STRENGTH_NAMES:
        changes = [
            np.abs(Corruption(kind=kind, severity=s, strengths=strengths)(image, 0) - image.astype(float)).mean()
            for s in range(1, 6)
        ]
        assert changes == sorted(changes)


# Batches -----------------------------------------------------------------------------------------------------------


def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    images, samples = np.stack([picture(seed=n) for n in range(5)]), [3, 1, 4, 1, 5]
    corruption = Corruption(kind="snow", severity=2, strengths="cifar")
    files = [tmp_path / f"{n}.png" for n in range(5)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    with Workers(1) as alone, Workers(3) as several:
        expected = alone.run(corrupt_images, corruption, images, samples)
        assert np.array_equal(several.run(corrupt_images, corruption, images, samples), expected)
        assert np.array_equal(several.run(corrupt_images, corruption, images[:2], samples[:2]), expected[:2])
        assert np.array_equal(several.run(read_images, SIDE, files), images)
        (tmp_path / "4.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"4\.png cannot be read as an image"):
            several.run(read_images, SIDE, files)


def test_files_are_read_as_central_squares(tmp_path: Path) -> None:
    wide = np.zeros((8, 12, 3), dtype=np.uint8)
    wide[:, 2:10] = picture(8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(read_images(8, [tmp_path / "wide.png"])[0], picture(8))
    assert read_images(4, [tmp_path / "wide.png"]).shape == (1, 4, 4, 3)
