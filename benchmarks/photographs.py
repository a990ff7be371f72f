"""Shards of photographs for benchmarks: a tar of yours, or what scikit-image ships cut to sizes like ImageNet's."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import numpy as np
from PIL import Image

_NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")


def photograph_shards(
    folder: Path, *, num: int, photos: Path | None = None, size: tuple[int, int] = (500, 375), mean_rgb: bool = True
) -> Path:
    """Pack `photos`, or `num` cut photographs of `size` (width, height), into `folder` if they are not there yet.

    With their mean colors, which some benchmarks need for linear colors.
    """
    name = f"shards-of-{photos.stem}" if photos else f"shards-{num}-of-{size[0]}x{size[1]}"
    shards = folder / (name if mean_rgb else f"{name}-without-means")
    if not (shards / "manifest.json").is_file():
        source = photos or write_photographs(folder / "photographs", num, size)
        command = [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())"]
        words = [*command, "pack", str(source), "--out", str(shards), *(["--mean-rgb"] if mean_rgb else [])]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return shards


def _originals() -> list[Image.Image]:
    """scikit-image's photographs, or where it is missing noise with a photograph's spectrum."""
    spec = util.find_spec("skimage")
    if spec is not None and spec.origin is not None:
        return [Image.open(Path(spec.origin).parent / "data" / name).convert("RGB") for name in _NAMES]
    print("scikit-image is missing: noise with a photograph's spectrum stands for its photographs", flush=True)
    return [_noise(seed, 800, 600) for seed in range(len(_NAMES))]


def _noise(seed: int, width: int, height: int) -> Image.Image:
    """Amplitudes that fall with the frequency as in photographs, mostly gray; its JPEGs are about as large."""
    spectrum = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    spectrum[0, 0] = np.inf
    random = np.random.default_rng(seed)
    shape = (4, height, width // 2 + 1)
    waves = (random.standard_normal(shape) + 1j * random.standard_normal(shape)) / spectrum
    gray, *colors = np.fft.irfft2(waves, s=(height, width))
    pixels = np.stack([gray + 0.3 * color for color in colors], axis=-1)
    return Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, num: int, size: tuple[int, int]) -> Path:
    """Write JPEGs of `size`, or turned: about the size and the detail of ImageNet's."""
    photographs = _originals()
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        random = np.random.default_rng(number)
        photograph = photographs[number % len(photographs)]
        width, height = size if random.random() < 0.75 else size[::-1]
        # A part of the photograph with the sides' ratio kept, so that no two files are the same.
        scale = random.uniform(0.7, 1.0) * min(photograph.width / width, photograph.height / height)
        left = random.uniform(0, photograph.width - scale * width)
        top = random.uniform(0, photograph.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
        image.save(folder / f"{number:05d}.jpg", quality=92)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(write, range(num)))
    return folder
