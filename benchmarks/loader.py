"""Loaders side by side: two MoCo v2 views at 224 pixels, in alternating rounds of one run, as ratios.

    python benchmarks/loader.py                     # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/loader.py --photos FILE.tar   # on photographs of your own, or --shards DIR
    python benchmarks/loader.py --only torch dali pil [--json FILE] [--plot FILE]

`torch`, `dali`, `ffcv` and `linear` (the torch backend with `--views.color linear`) are ours. What a user would take
instead: `pil` is what the authors' code does, PIL and torchvision's transforms in a DataLoader with a worker a
CPU, to normalized float; `lightly` the same with lightly's MoCoV2Transform; `tv2` torchvision's v2 transforms on uint8
tensors; `dali-stock` DALI with its random crop, blur and color operators. All read the same bytes from page cache.

Beside samples/s stands the processor time of all processes a sample: it depends less on what else the machine does.
"""

import argparse
import importlib.util
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from alternating import Claim, bars, claims_table, compare, header, write_claims
from photographs import photograph_shards
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from shards.ground.cpus import available_cpus
from shards.ground.progress import ProgressBars
from shards.sets import open_set
from shards.tools.beton import write_beton

Opened = tuple[Iterator[Any], Callable[[], None]]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Options:
    """What all contestants are asked for."""

    shards: str
    size: int
    batch_size: int


class EncodedPhotos:
    """The encoded bytes of each sample, as a folder of files would give them."""

    def __init__(self, shards: str) -> None:
        opened = open_set(shards)
        self._places = [
            (opened.shard_path(shard), int(record["offset"]), int(record["size"]))
            for shard in range(opened.num_shards)
            for record in opened.index(shard)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class PilBlur:
    """Gaussian blur as in SimCLR and MoCo v2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_views(size: int) -> Callable[[bytes], Any]:
    """The transform of the authors' main_moco.py with --aug-plus."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )

    def views(encoded: bytes) -> Any:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return transform(image), transform(image)

    return views


def lightly_views(size: int) -> Callable[[bytes], Any]:
    """What lightly gives for MoCo v2, at its own settings but for the size."""
    from lightly.transforms import MoCoV2Transform

    transform = MoCoV2Transform(input_size=size)
    return lambda encoded: tuple(transform(Image.open(io.BytesIO(encoded)).convert("RGB")))


def tv2_views(size: int) -> Callable[[bytes], Any]:
    """Torchvision's v2 transforms on uint8 tensors; blur as wide as in the recipe."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
        ]
    )

    def views(encoded: bytes) -> Any:
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        image = decode_jpeg(data, mode=ImageReadMode.RGB)
        return transform(image), transform(image)

    return views


VIEWS = {"pil": pil_views, "lightly": lightly_views, "tv2": tv2_views}


class PhotoViews(torch.utils.data.Dataset[Any]):
    """Two views of a sample by one of VIEWS."""

    def __init__(self, name: str, options: Options) -> None:
        self._photos = EncodedPhotos(options.shards)
        self._views = VIEWS[name](options.size)

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Any:
        return self._views(self._photos[index])


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def open_torch_loader(name: str, options: Options) -> Opened:
    loader = torch.utils.data.DataLoader(
        PhotoViews(name, options),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=available_cpus(),
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    batches = endless(loader)
    return batches, lambda: None


def open_dali_stock(options: Options) -> Opened:
    """DALI's own operators, in their usual order."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    photos = EncodedPhotos(options.shards)
    order = np.random.default_rng(0)

    def encoded() -> list[np.ndarray]:
        return [np.frombuffer(photos[i], np.uint8) for i in order.integers(0, len(photos), options.batch_size)]

    @pipeline_def(enable_conditionals=True)
    def both() -> Any:
        images = fn.decoders.image(fn.external_source(encoded, batch=True, dtype=types.UINT8, ndim=1))
        return tuple(view(images) for _ in range(2))

    def view(images: Any) -> Any:
        out = fn.random_resized_crop(images, size=(options.size, options.size), random_area=(0.2, 1.0), antialias=True)
        if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
            out = fn.color_twist(
                out,
                brightness=fn.random.uniform(range=(0.6, 1.4)),
                contrast=fn.random.uniform(range=(0.6, 1.4)),
                saturation=fn.random.uniform(range=(0.6, 1.4)),
                hue=fn.random.uniform(range=(-36.0, 36.0)),
            )
        if fn.random.coin_flip(probability=0.2, dtype=types.BOOL):
            out = fn.hsv(out, saturation=0.0)
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            out = fn.gaussian_blur(out, sigma=fn.random.uniform(range=(0.1, 2.0)))
        return fn.flip(out, horizontal=fn.random.coin_flip())

    pipe = both(
        batch_size=options.batch_size, num_threads=available_cpus(), device_id=None, prefetch_queue_depth=2, seed=0
    )
    pipe.build()

    def batches() -> Iterator[Any]:
        while True:
            yield pipe.run()

    return batches(), lambda: None


def open_ours(name: str, options: Options) -> Opened:
    shards = options.shards
    if name == "ffcv":
        # Beside the shards: it is written once.
        shards = f"{shards.rstrip('/')}.beton"
        if not Path(shards).exists():
            write_beton(options.shards, shards, workers=1, progress=ProgressBars(enabled=False))
    data = DataConfig(
        shards=shards,
        batch_size=options.batch_size,
        backend="torch" if name == "linear" else name,
    )
    views = ViewsConfig(size=options.size, color="linear" if name == "linear" else "torchvision")
    loader = open_loader(data, views, seed=0, device=torch.device("cpu"))
    return endless(loader), loader.close


def open_contestant(name: str, options: Options) -> Opened:
    if name in VIEWS:
        return open_torch_loader(name, options)
    return open_dali_stock(options) if name == "dali-stock" else open_ours(name, options)


def cpu_seconds() -> float:
    """Processor time of this process and its living children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(each.user + each.system for each in times)


def measure(name: str, options: Options, seconds: float) -> tuple[float, float]:
    """(samples/s, milliseconds of processor time a sample)."""
    batches, close = open_contestant(name, options)
    for _ in range(3):
        next(batches)
    begin, cpu, num = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        num += options.batch_size
    figures = num / (time.perf_counter() - begin), 1e3 * (cpu_seconds() - cpu) / num
    close()
    return figures


def claims_of(rates: dict[str, list[float]], size: int) -> list[Claim]:
    """Each of ours against each alternative that was timed."""
    goals = {("torch", "pil"): 4.0, ("dali", "pil"): 2.5, ("dali", "dali-stock"): 1.3}
    goals |= {("torch", peer): 1.0 for peer in ("lightly", "tv2", "dali-stock")}
    peers = [name for name in (*VIEWS, "dali-stock") if name in rates]
    return [
        compare(
            f"two views at {size} pixels: {ours} backend / {theirs}",
            rates[ours],
            rates[theirs],
            unit="samples/s",
            goal=goals.get((ours, theirs)),
        )
        for ours in ("torch", "dali", "ffcv", "linear")
        if ours in rates
        for theirs in peers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    every = ["torch", "dali", "ffcv", "linear", *VIEWS, "dali-stock"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--plot", type=Path, help="where to draw the rates")
    asked = parser.parse_args()
    how = {"lightly": "install benchmarks/requirements.txt", "ffcv": "make setup-ffcv"}
    left_out = [name for name in asked.only if name in how and not importlib.util.find_spec(name)]
    names = [name for name in asked.only if name not in left_out]
    for name in left_out:
        print(f"{name} is left out; to have it: {how[name]}")
    rates: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        shards = asked.shards or str(photograph_shards(Path(folder), num=300, photos=asked.photos))
        options = Options(shards, asked.size, asked.batch_size)
        for _ in range(asked.rounds):
            for name in names:
                rate, cost = measure(name, options, asked.seconds)
                rates[name].append(rate)
                costs[name].append(cost)
                print(f"{name:<13}{rate:9.0f} samples/s{cost:8.2f} ms of processor time a sample", flush=True)
    print(f"\n{header()}; size {asked.size}, batch {asked.batch_size}, {asked.rounds} rounds\n")
    print("| | samples/s, median (all) | ms of processor time a sample |\n|---|---|---|")
    for name in names:
        every_rate = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(
            f"| {name} | {statistics.median(rates[name]):.0f} ({every_rate}) | {statistics.median(costs[name]):.2f} |"
        )
    claims = claims_of(rates, asked.size)
    print(f"\n{claims_table(claims)}")
    write_claims(asked.json, claims)
    bars(asked.plot, {f"Two MoCo v2 views at {asked.size} pixels": rates}, unit="samples/s")


if __name__ == "__main__":
    main()
