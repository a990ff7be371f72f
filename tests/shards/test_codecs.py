"""What the packer asks of its libraries."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards.images.libraries import shrink, sum_channels


def _photo_like(height: int, width: int) -> NDArray[np.uint8]:
    """Noise whose amplitude falls with frequency as a photo's does, (height, width, 3)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    image = np.fft.irfft2(spectrum / frequency, s=(height, width))
    image = 128 + 48 * image / image.std()
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("factor", [1.02, 1.1, 1.25, 1.4, 1.6])
def test_shrinking_a_little_is_closer_to_lanczos_than_the_mean_of_areas(factor: float) -> None:
    image = _photo_like(300, 400)
    size = (round(400 / factor), round(300 / factor))
    lanczos = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)).astype(np.float64)
    area = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    assert np.abs(shrink(image, size) - lanczos).mean() < np.abs(area - lanczos).mean()


@pytest.mark.parametrize("factor", [1.0, 1.3, 1.69, 1.7, 2.0, 3.3])
def test_shrinking_keeps_places_and_brightness(factor: float) -> None:
    ramp = np.tile(np.linspace(20, 230, 340).astype(np.uint8)[None, :, None], (255, 1, 1))
    size = (round(340 / factor), round(255 / factor))
    small = shrink(ramp, size)
    assert small.shape == (size[1], size[0], 1)
    centers = (np.arange(size[0]) + 0.5) * 340 / size[0] - 0.5
    expected = np.interp(centers, np.arange(340), ramp[0, :, 0])
    assert np.abs(small[:, :, 0] - expected)[:, 3:-3].max() <= 1.5


@pytest.mark.parametrize("channels", [1, 3])
def test_sums_of_channels_are_exact(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 901, channels), dtype=np.uint8)
    assert sum_channels(pixels) == pixels.astype(np.int64).sum(axis=(0, 1)).tolist()
