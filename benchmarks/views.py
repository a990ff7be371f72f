"""Multi-crop and k views per sample: our loaders beside lightly's and DINO's transforms, by turns in one run.

    python benchmarks/views.py                      # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/views.py --photos FILE.tar    # on photographs of your own, or --shards DIR
    python benchmarks/views.py --sets dino [--json FILE] [--plot FILE]

Sets of views, each made of one decode by everyone:

dino   2 x 224 + 6 x 96: our `VIEWS["dino"]` with six small views; `dino`: its authors' augmentation restated from
       torchvision's transforms (bicubic, as theirs; we and lightly resize bilinearly); `lightly`: DINOTransform.
swav   2 x 224 + 6 x 96: our `VIEWS["multi-crop"]`; `lightly`: SwaVTransform, which is its MultiCropTransform.
k2, k4, k8   views of 224 pixels by MoCo v2's recipe; `pil`: the authors' transforms; `lightly`: MoCoV2Transform's.

`torch` and `dali` are ours, with uint8 views. The others run in a DataLoader with a worker per CPU and give normalized
float. All read the same bytes from page cache. Beside samples/s stands the processor time of all processes per sample:
it depends less on what else the machine does.
"""

import argparse
import importlib.util
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from alternating import Claim, bars, claims_table, compare, header, write_claims
from loaders.base import PhotoViews, endless
from photographs import photograph_shards
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipelines.config import VIEWS, DataConfig, ViewSpec
from pipelines.loader import open_loader
from shards.ground.cpus import available_cpus

GOAL = 4.0
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OURS = ("torch", "dali")

Transform = Callable[[Image.Image], Sequence[torch.Tensor]]
Figures = dict[str, list[float]]


def some_blur(p: float) -> Any:
    """Pillow's Gaussian blur with a sigma of 0.1 to 2, as in SimCLR, MoCo v2 and DINO."""
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    return transforms.RandomApply([blur], p=p)


def to_normalized() -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(mean=MEAN, std=STD)]


def dino_view(size: int, scale: tuple[float, float], *, blur_p: float, solarize_p: float = 0.0) -> Any:
    """One view of DataAugmentationDINO (Caron et al. 2021; main_dino.py), of the same operations in its order."""
    solarize = transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], p=solarize_p)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            some_blur(blur_p),
            *([solarize] if solarize_p else []),
            *to_normalized(),
        ]
    )


def dino_transforms() -> list[Any]:
    """2 x 224 + 6 x 96 as DINO's authors make them."""
    local = dino_view(96, (0.05, 0.4), blur_p=0.5)
    first = dino_view(224, (0.4, 1.0), blur_p=1.0)
    second = dino_view(224, (0.4, 1.0), blur_p=0.1, solarize_p=0.2)
    return [first, second, *[local] * 6]


def dino_views() -> Transform:
    views = dino_transforms()
    return lambda image: [view(image) for view in views]


def pil_views(num: int) -> Transform:
    """As many views as asked for by the transforms of MoCo v2's authors."""
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            some_blur(0.5),
            transforms.RandomHorizontalFlip(),
            *to_normalized(),
        ]
    )
    return lambda image: [view(image) for _ in range(num)]


def lightly_dino_views() -> Transform:
    from lightly.transforms import DINOTransform

    return DINOTransform()


def lightly_swav_views() -> Transform:
    from lightly.transforms import SwaVTransform

    return SwaVTransform()


def lightly_moco_views(num: int) -> Transform:
    from lightly.transforms import MoCoV2Transform
    from lightly.transforms.multi_view_transform import MultiViewTransform

    return MultiViewTransform([MoCoV2Transform(input_size=224).transforms[0]] * num)


@dataclass(frozen=True, kw_only=True)
class ViewSet:
    """A set of views as we are asked for it, and who else makes it."""

    title: str
    ours: tuple[ViewSpec, ...]
    peers: dict[str, Callable[[], Transform]]


def k_views(num: int) -> ViewSet:
    return ViewSet(
        title=f"{num} x 224",
        ours=(ViewSpec(size=224, recipe=VIEWS["moco-v2"].query),) * num,
        peers={"pil": lambda: pil_views(num), "lightly": lambda: lightly_moco_views(num)},
    )


SETS = {
    "dino": ViewSet(
        title="DINO, 2 x 224 + 6 x 96",
        ours=replace(VIEWS["dino"], num_small=6).specs,
        peers={"dino": dino_views, "lightly": lightly_dino_views},
    ),
    "swav": ViewSet(
        title="SwAV, 2 x 224 + 6 x 96", ours=VIEWS["multi-crop"].specs, peers={"lightly": lightly_swav_views}
    ),
    "k2": k_views(2),
    "k4": k_views(4),
    "k8": k_views(8),
}


def transformed(transform: Transform, encoded: bytes) -> list[torch.Tensor]:
    """Views of a photograph by a transform of a Pillow image."""
    return list(transform(Image.open(io.BytesIO(encoded)).convert("RGB")))


def open_peer(shards: str, transform: Transform, batch_size: int) -> Iterator[Any]:
    """Batches of a DataLoader with a worker per CPU, whose workers run from now on."""
    loader = torch.utils.data.DataLoader(
        PhotoViews(shards, partial(transformed, transform)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=available_cpus(),
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    batches = endless(loader)
    next(batches)
    return batches


def open_ours(shards: str, backend: Any, views: tuple[ViewSpec, ...], batch_size: int, closing: ExitStack) -> Any:
    data = DataConfig(shards=shards, batch_size=batch_size, backend=backend)
    loader = closing.enter_context(open_loader(data, views, seed=0, device=torch.device("cpu")))
    return (batch.views for batch in endless(loader))


def processor_s() -> float:
    """Return the processor time of this process and its living children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(each.user + each.system for each in times)


def settle(*, at_most_s: float = 10.0) -> None:
    """Wait until no loader is at work: those that are not asked have filled their queues."""
    deadline, before = time.perf_counter() + at_most_s, processor_s()
    while time.perf_counter() < deadline:
        time.sleep(0.2)
        now = processor_s()
        if now - before < 0.03:
            return
        before = now


def measure(batches: Iterator[Sequence[torch.Tensor]], sizes: Sequence[int], seconds: float) -> tuple[float, float]:
    """Return samples/s and milliseconds of processor time per sample, of all loaders' one that is asked."""
    # What had been made before is taken first.
    views: Sequence[torch.Tensor] = ()
    for _ in range(2 * available_cpus() + 1):
        views = next(batches)
    assert [view.shape[-1] for view in views] == list(sizes), "all make the same views"
    begin, cpu, num = time.perf_counter(), processor_s(), 0
    while time.perf_counter() - begin < seconds:
        num += len(next(batches)[0])
    return num / (time.perf_counter() - begin), 1e3 * (processor_s() - cpu) / num


def measure_set(view_set: ViewSet, peers: Sequence[str], shards: str, options: argparse.Namespace) -> Any:
    """Return samples/s and processor time of everyone, round by round."""
    rates: Figures = {name: [] for name in (*OURS, *peers)}
    costs: Figures = {name: [] for name in rates}
    with ExitStack() as closing:
        # The DataLoaders fork, so they come before threads of ours.
        batches = {name: open_peer(shards, view_set.peers[name](), options.batch_size) for name in peers}
        batches |= {name: open_ours(shards, name, view_set.ours, options.batch_size, closing) for name in OURS}
        for _ in range(options.rounds):
            for name in rates:
                settle()
                rate, cost = measure(batches[name], [view.size for view in view_set.ours], options.seconds)
                rates[name].append(rate)
                costs[name].append(cost)
    return rates, costs


def claims_of(title: str, rates: Figures, costs: Figures) -> list[Claim]:
    """Each of ours against each alternative, by rate and by processor time; the torch backend is held to the goal."""
    claims: list[Claim] = []
    for ours in OURS:
        for theirs in (name for name in rates if name not in OURS):
            name, goal = f"{title}: {ours} backend / {theirs}", GOAL if ours == "torch" else None
            claims.append(compare(name, rates[ours], rates[theirs], unit="samples/s", goal=goal))
            claims.append(
                compare(
                    f"{name}, processor time", costs[ours], costs[theirs], unit="ms per sample", less_is_better=True
                )
            )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="of views")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="that each one is timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--plot", type=Path, help="where to draw the rates")
    options = parser.parse_args()
    has_lightly = importlib.util.find_spec("lightly") is not None
    if not has_lightly:
        print("lightly is left out; to have it: install benchmarks/requirements.txt\n")
    claims: list[Claim] = []
    panels: dict[str, Figures] = {}
    lines = ["| views | loader | samples/s, median (all) | ms of processor time per sample |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        shards = options.shards or str(photograph_shards(Path(folder), num=300, photos=options.photos))
        for view_set in (SETS[name] for name in options.sets):
            peers = [name for name in view_set.peers if has_lightly or name != "lightly"]
            rates, costs = measure_set(view_set, peers, shards, options)
            for name, of_one in rates.items():
                every = ", ".join(f"{rate:.0f}" for rate in of_one)
                figures = f"{statistics.median(of_one):.0f} ({every}) | {statistics.median(costs[name]):.2f}"
                lines.append(f"| {view_set.title} | {name} | {figures} |")
            claims += claims_of(view_set.title, rates, costs)
            panels[view_set.title] = rates
    print(f"{header()}; batch {options.batch_size}, {options.rounds} rounds\n")
    print("\n".join(lines))
    print(f"\n{claims_table(claims)}")
    write_claims(options.json, claims)
    bars(options.plot, panels, unit="samples/s")


if __name__ == "__main__":
    main()
