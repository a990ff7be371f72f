"""Loader of `moco-fast transfer detect` beside a DataLoader of torchvision's v2 transforms, in rounds of one run.

    python benchmarks/transfer_loader.py                     # on scikit-image's photographs, cut to 640 x 480
    python benchmarks/transfer_loader.py --photos FILE.tar   # on photographs of your own
    python benchmarks/transfer_loader.py --only ours tv2-pil [--masks] [--json FILE]

All give images of 640 to 800 pixels and their boxes, with `--masks` also masks, as Mask R-CNN on COCO is trained, in
batches of 16. `ours` reads the folder, `shards` what `make-shards pack --annotations` makes of it, by threads.
What a user would take instead: a DataLoader with a worker per CPU, `tv2-pil` as torchvision's reference for detection
does by default, `tv2-tensor` with its `--backend tensor`, whose pixels are not those of Pillow, with which detectors
were trained. Each is also timed beside a busy interpreter, which is what a training is for threads.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternating import Claim, claims_table, compare, header, write_claims
from photographs import write_photographs
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from moco_fast.transfer.layouts import read_sets
from moco_fast.transfer.loader import TrainingImages
from moco_fast.transfer.presets import PRESETS, DetectPreset
from pipelines.world import World
from shards.config import PackConfig
from shards.ground.cpus import available_cpus
from shards.packing.pack import pack

_OBJECTS = 7  # of an image, on average in COCO
_CORNERS = 20


def write_coco(folder: Path, *, num: int, photos: Path | None) -> None:
    """Write a part of a set in COCO's layout: photographs with boxes and outlines at random places."""
    place = folder / "train2017"
    if photos is None:
        write_photographs(place, num, (640, 480))
    else:
        place.mkdir(parents=True)
        with tarfile.open(photos) as tar:
            for number, member in enumerate(each for each in tar if each.isfile()):
                file = tar.extractfile(member)
                assert file is not None
                (place / f"{number:05d}.jpg").write_bytes(file.read())
                if number + 1 == num:
                    break
    random = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for path in sorted(place.iterdir()):
        width, height = Image.open(path).size
        images.append({"id": len(images), "file_name": path.name, "width": width, "height": height})
        for _ in range(_OBJECTS):
            radius = random.uniform(0.05, 0.25) * min(width, height)
            x, y = (random.uniform(radius, side - radius) for side in (width, height))
            angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
            reach = radius * random.uniform(0.6, 1.0, _CORNERS)
            corners = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1)
            low, high = corners.min(axis=0), corners.max(axis=0)
            objects.append(
                {
                    "id": len(objects),
                    "image_id": images[-1]["id"],
                    "category_id": 1,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "segmentation": [corners.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
    told = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(told))


class ReferenceImages(torch.utils.data.Dataset[Any]):
    """Images with targets, as references/detection of pytorch/vision reads and augments them."""

    def __init__(self, data: Any, preset: DetectPreset, *, as_tensors: bool) -> None:
        self._images, self._masks, self._as_tensors = data.with_boxes.images, preset.masks, as_tensors
        resize = v2.RandomShortestSize(min_size=list(preset.sides), max_size=preset.longest)
        self._transform = v2.Compose([resize, v2.RandomHorizontalFlip(0.5), v2.ToPureTensor()])
        self._to_tensor = None if as_tensors else v2.PILToTensor()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Any:
        found = self._images[number]
        if self._as_tensors:
            image: Any = tv_tensors.Image(decode_image(str(found.path), ImageReadMode.RGB))
        else:
            image = Image.open(found.path).convert("RGB")
        size = (found.height, found.width)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(found.boxes), format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue] - torch's metaclass hides it
            "labels": torch.from_numpy(found.classes),
        }
        if self._masks:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(_drawn(found)))
        image, target = self._transform(image, target)
        return (image if self._to_tensor is None else self._to_tensor(image)), target


def _drawn(found: Any) -> Any:
    """Draw outlines in the image's own size, as `convert_coco_poly_to_mask` there."""
    mask: Any = import_module("faster_coco_eval.core.mask")
    drawn = [
        mask.decode(mask.frPyObjects([each.ravel().tolist() for each in outline], found.height, found.width))
        for outline in found.outlines
    ]
    return np.stack([each.any(axis=2).astype(np.uint8) for each in drawn])


def ours(where: Path, preset: DetectPreset, stack: ExitStack) -> Iterator[Any]:
    """Batches as `moco-fast transfer` trains on them."""
    data, _ = read_sets([str(where)], preset, class_names=None)
    world = World(rank=0, world_size=1, local_world_size=1)
    images = TrainingImages(data.with_boxes, preset, seed=0, world=world, threads=available_cpus(), at_most_damaged=0.0)
    return stack.enter_context(images).batches(0)


def theirs(where: Path, preset: DetectPreset, *, as_tensors: bool) -> Iterator[Any]:
    """Batches without end of a DataLoader."""
    data, _ = read_sets([str(where)], preset, class_names=None)
    loader = torch.utils.data.DataLoader(
        ReferenceImages(data, preset, as_tensors=as_tensors),
        batch_size=preset.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=available_cpus(),
        collate_fn=_as_lists,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    while True:
        yield from loader


def _as_lists(items: Any) -> Any:
    return tuple(zip(*items, strict=True))


def images_per_s(batches: Iterator[Any], *, batch_size: int, seconds: float, busy: bool) -> float:
    """Images/s of batches that are taken and dropped, by the clock."""
    over = threading.Event()
    spinning = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(over.is_set, True)])
    for _ in range(2):
        next(batches)
    if busy:
        spinning.start()
    begin, num = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        num += batch_size
    rate = num / (time.perf_counter() - begin)
    if busy:
        over.set()
        spinning.join()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="tar of photographs")
    parser.add_argument("--num", type=int, default=200, help="photographs")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    every = ["ours", "shards", "tv2-pil", "tv2-tensor"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    preset = replace(PRESETS["coco-fpn-1x"], masks=asked.masks, test=("train2017",))
    rates: dict[tuple[str, bool], list[float]] = {(name, busy): [] for busy in (False, True) for name in asked.only}
    with tempfile.TemporaryDirectory() as root:
        folder, shards = Path(root) / "coco", Path(root) / "shards"
        write_coco(folder, num=asked.num, photos=asked.photos)
        pack(PackConfig(sources=(str(folder),), out=str(shards), annotations=True))
        contestants: dict[str, Callable[[ExitStack], Iterator[Any]]] = {
            "ours": lambda stack: ours(folder, preset, stack),
            "shards": lambda stack: ours(shards, preset, stack),
            "tv2-pil": lambda _: theirs(folder, preset, as_tensors=False),
            "tv2-tensor": lambda _: theirs(folder, preset, as_tensors=True),
        }
        for _ in range(asked.rounds):
            for (name, busy), found in rates.items():
                with ExitStack() as stack:
                    batches = contestants[name](stack)
                    rate = images_per_s(batches, batch_size=preset.batch_size, seconds=asked.seconds, busy=busy)
                    del batches
                found.append(rate)
                print(
                    f"{name:<11} {'beside a busy interpreter' if busy else 'alone':<26}{rate:7.1f} images/s", flush=True
                )
    print(f"\n{header()}; {'boxes and masks' if asked.masks else 'boxes'}, {asked.rounds} rounds\n")
    for (name, busy), found in rates.items():
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"{name}, {'busy' if busy else 'alone'}: {statistics.median(found):.1f} ({spread})")
    claims = claims_of(rates, "boxes and masks" if asked.masks else "boxes")
    print(f"\n{claims_table(claims)}")
    write_claims(asked.json, claims)


def claims_of(rates: dict[tuple[str, bool], list[float]], what: str) -> list[Claim]:
    """Ours against each alternative that was timed."""
    return [
        compare(
            f"images with {what}, 640 to 800 pixels{', beside a busy interpreter' if busy else ''}: {name} / {other}",
            rates[name, busy],
            rates[other, busy],
            unit="images/s",
            goal=1.0 if other == "tv2-pil" else None,
        )
        for busy in (False, True)
        for name in ("ours", "shards")
        for other in ("tv2-pil", "tv2-tensor")
        if (name, busy) in rates and (other, busy) in rates
    ]


if __name__ == "__main__":
    main()
