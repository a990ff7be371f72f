"""Loaders side by side: two MoCo v2 views at 224 pixels, in alternating rounds of one run, as ratios.

    python benchmarks/loader.py                     # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/loader.py --shards DIR        # on shards of your own
    python benchmarks/loader.py --size 32 --only dali torch

`pil` is what the authors' code does: PIL and torchvision's transforms in a DataLoader with a worker a CPU, to float.
`dali` and `torch` are ours. `reading` is our reader alone, `reading-busy` the same beside a busy interpreter.
"""

import argparse
import io
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from pipelines.config import DataConfig, ViewsConfig
from pipelines.cpus import available_cpus
from pipelines.loader import open_loader
from pipelines.reader import Reader
from shards import ShardSet


class PilBlur:
    """Gaussian blur as in SimCLR and MoCo v2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class PilViews(torch.utils.data.Dataset[Any]):
    """Two views of a sample by PIL."""

    def __init__(self, shards: str, size: int) -> None:
        self._shards = ShardSet.open(shards)
        self._reader: Reader | None = None
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([PilBlur()], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return self._shards.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._reader is None:
            self._reader = Reader(self._shards, num_threads=1)
        one = np.array([index])
        [encoded] = self._reader.submit(one, self._reader.records(one)).result()
        image = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
        return self._transform(image), self._transform(image)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def open_pil(shards: str, size: int, batch_size: int) -> tuple[Iterator[Any], Callable[[], None]]:
    loader = torch.utils.data.DataLoader(
        PilViews(shards, size),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=available_cpus(),
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    return endless(loader), lambda: None


def open_ours(backend: str, shards: str, size: int, batch_size: int) -> tuple[Iterator[Any], Callable[[], None]]:
    data = DataConfig(shards=shards, batch_size=batch_size, backend=backend)  # pyright: ignore[reportArgumentType]
    loader = open_loader(data, ViewsConfig(size=size), seed=0, device=torch.device("cpu"))
    return endless(loader), loader.close


def open_reading(shards: str, batch_size: int, *, busy: bool) -> tuple[Iterator[Any], Callable[[], None]]:
    opened = ShardSet.open(shards)
    reader = Reader(opened)
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            sum(range(100))

    other = threading.Thread(target=spin) if busy else None
    if other is not None:
        other.start()

    def batches() -> Iterator[Any]:
        rng = np.random.default_rng(0)
        while True:
            samples = rng.integers(0, opened.num_samples, batch_size)
            yield reader.submit(samples, reader.records(samples)).result()

    def close() -> None:
        over.set()
        if other is not None:
            other.join()
        reader.close()

    return batches(), close


def open_contestant(name: str, shards: str, size: int, batch_size: int) -> tuple[Iterator[Any], Callable[[], None]]:
    if name == "pil":
        return open_pil(shards, size, batch_size)
    if name.startswith("reading"):
        return open_reading(shards, batch_size, busy=name.endswith("busy"))
    return open_ours(name, shards, size, batch_size)


def samples_per_s(name: str, shards: str, options: argparse.Namespace) -> float:
    batches, close = open_contestant(name, shards, options.size, options.batch_size)
    for _ in range(3):
        next(batches)
    begin, num = time.perf_counter(), 0
    while time.perf_counter() - begin < options.seconds:
        next(batches)
        num += options.batch_size
    rate = num / (time.perf_counter() - begin)
    close()
    return rate


def pack_photographs(folder: Path, copies: int) -> str:
    """Pack crops of 500 x 375 of scikit-image's photographs."""
    from skimage import data

    from shards.config import PackConfig
    from shards.pack import pack

    rng = np.random.default_rng(0)
    source = folder / "images"
    source.mkdir()
    for number in range(copies):
        photo = np.asarray((data.astronaut, data.coffee, data.rocket)[number % 3]())
        y, x = (int(rng.integers(0, extent - most + 1)) for extent, most in zip(photo.shape, (375, 500), strict=False))
        Image.fromarray(photo[y : y + 375, x : x + 500]).save(source / f"{number}.jpg", quality=92)
    pack(PackConfig(sources=(str(source),), out=str(folder / "shards")))
    return str(folder / "shards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["pil", "dali", "torch", "reading", "reading-busy"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = options.shards or pack_photographs(Path(folder), 300)
        rates: dict[str, list[float]] = {name: [] for name in options.only}
        for _ in range(options.rounds):
            for name, found in rates.items():
                found.append(samples_per_s(name, shards, options))
                print(f"{name:<13}{found[-1]:9.0f} samples/s", flush=True)
    print(f"\n{available_cpus()} CPUs, size {options.size}, batch {options.batch_size}, {options.rounds} rounds")
    base = statistics.median(rates[options.only[0]])
    for name, found in rates.items():
        middle = statistics.median(found)
        print(
            f"{name:<13}{min(found):8.0f} to {max(found):6.0f} samples/s, {middle / base:6.2f} times {options.only[0]}"
        )


if __name__ == "__main__":
    main()
