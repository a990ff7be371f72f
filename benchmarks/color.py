"""Colors of each backend: how far they are from the MoCo authors' Pillow pipeline, and what they cost.

    python benchmarks/color.py                    # on photographs that scikit-image carries
    python benchmarks/color.py --photos FILE.tar  # on photographs of your own, or --shards DIR
    python benchmarks/color.py --num 100 [--json FILE]

The same parameters are drawn for both, on the recipes' own crops; the authors' pipeline is Pillow and torchvision's
transforms in their order (crop, jitter, grayscale, blur, solarize, flip; v1: grayscale first). Differences are in
levels of 0..255, over both views, for whole recipes and for single operations of the jitter. `linear with gray` is what
training refuses: linear colors on shards without mean colors. `control`: torchvision's operations on uint8 tensors in
place of Pillow images. FFCV is left out where it is not installed.

The second table is of the torch backend, on one thread: what the colors of a sample's two views take, beside
torchvision's operations on Pillow images and on tensors, and what decoding and making both views takes with colors
and without; the third, where that time goes.
"""

import argparse
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as F
from alternating import Claim, alternate, claims_table, compare, header, write_claims
from photographs import photograph_shards
from PIL import Image, ImageFilter, ImageOps

from pipelines.backends.colors import recolor
from pipelines.backends.pixels import decode, render
from pipelines.config import VIEWS, ViewConfig, ViewsConfig
from pipelines.loader import make_views
from pipelines.plan.augment import ViewTable
from pipelines.plan.draw import draw_views
from pipelines.reading.reader import Reader
from shards.ground.progress import ProgressBars
from shards.sets import ShardSet, open_set
from shards.tools.beton import write_beton

STILL = ViewConfig(
    flip_p=0.0, jitter_p=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grayscale_p=0.0, blur_p=0.0
)
RECIPES = {name: VIEWS[name] for name in ("moco-v1", "moco-v2", "moco-v3")}
ALONE = {
    f"{name} {strength}": ViewsConfig(query=replace(STILL, **{name: strength}), key=replace(STILL, **{name: strength}))
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.4), ("hue", 0.1), ("hue", 0.4))
}
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
MOST = 256
# The largest mean difference that a recipe may have: torchvision's tensors differ from Pillow by 0.6.
GOAL = 1.0
# At least so much of the speed must be left with colors.
SPEED_LEFT = 0.85
ROUNDS = 7


def adjust(image: Image.Image | torch.Tensor, table: ViewTable, row: int) -> Image.Image | torch.Tensor:
    """Apply jitter and grayscale by torchvision, to a picture or to a (3, H, W) tensor."""
    to_gray = F.to_grayscale if isinstance(image, Image.Image) else F.rgb_to_grayscale
    if table.grayscale[row] and table.grayscale_first:
        image = to_gray(image, 3)
    for stage in table.jitter_order[row].tolist():
        factor = float(table.factors[row, stage])
        if factor != (0.0 if stage == 3 else 1.0):
            image = ADJUST[stage](image, factor)
    if table.grayscale[row] and not table.grayscale_first:
        image = to_gray(image, 3)
    return image


def by_authors(encoded: np.ndarray, table: ViewTable, row: int, size: int, *, tensors: bool = False) -> np.ndarray:
    """One view as the authors' transforms make it, (size, size, 3); with `tensors`, colors by torchvision's tensors."""
    x, y, width, height = table.box[row].tolist()
    image = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
    image = F.resized_crop(image, y, x, height, width, [size, size], F.InterpolationMode.BILINEAR)
    if tensors:
        image = Image.fromarray(adjust(F.pil_to_tensor(image), table, row).permute(1, 2, 0).numpy())
    else:
        image = adjust(image, table, row)
    if table.sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(table.sigma[row])))
    if table.solarize[row]:
        image = ImageOps.solarize(image)
    return np.asarray(ImageOps.mirror(image) if table.flip[row] else image)


def drawn(
    shards: ShardSet, samples: np.ndarray, views: ViewsConfig
) -> tuple[Sequence[np.ndarray], tuple[ViewTable, ViewTable]]:
    """Encoded images of samples, and the parameters of both views."""
    reader = Reader(shards, num_threads=1)
    records = reader.records(samples)
    encoded = reader.submit(samples, records).result()
    reader.close()
    return encoded, draw_views(0, samples, records, views=views.specs, seed=3)


def views_of(shards: ShardSet, samples: np.ndarray, views: ViewsConfig, backend: str) -> np.ndarray:
    """(2, n, size, size, 3) uint8 by a backend of ours, or by the authors' pipeline or the control."""
    if backend in ("dali", "ffcv"):
        made = make_views(shards, samples, views, seed=3, epoch=0, backend=backend)
        return np.stack([view.permute(0, 2, 3, 1).numpy() for view in made])
    encoded, tables = drawn(shards, samples, views)
    if backend == "torch":
        # As its worker processes do it (tests/pipelines/test_workers.py), without their start.
        return rendered(encoded, tables, views.size)
    tensors = backend == "control"
    made = [
        [by_authors(each, table, row, views.size, tensors=tensors) for row, each in enumerate(encoded)]
        for table in tables
    ]
    return np.array(made)


def rendered(encoded: Sequence[np.ndarray], tables: Sequence[ViewTable], size: int) -> np.ndarray:
    """(2, n, size, size, 3) uint8 by the torch backend's code."""
    out = np.empty((len(tables), len(encoded), size, size, 3), dtype=np.uint8)
    for row, each in enumerate(encoded):
        image = decode(each)
        for view, table in enumerate(tables):
            render(image, table, row, out[view, row])
    return out


def contestants(
    shards: ShardSet, beton: ShardSet | None, plain: ShardSet | None
) -> Iterator[tuple[str, ShardSet, str, str]]:
    """Give (name, data, backend, views.color)."""
    for color in ("torchvision", "linear"):
        yield f"torch, {color}", shards, "torch", color
        yield f"dali on the CPU, {color}", shards, "dali", color
        if beton is not None:
            yield f"ffcv, {color}", beton, "ffcv", color
    if plain is not None:
        yield "torch, linear with gray for the mean colors", plain, "torch", "linear"
    yield "control", shards, "control", "torchvision"


def colorless(table: ViewTable) -> ViewTable:
    """The same without jitter, grayscale and solarize."""
    off = np.zeros(len(table.solarize), dtype=np.bool_)
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(off), 1))
    return replace(table, factors=factors, matrix=None, grayscale=off, solarize=off)


def without_blur(tables: Sequence[ViewTable]) -> tuple[ViewTable, ...]:
    """The same with no view blurred."""
    return tuple(replace(table, sigma=np.zeros_like(table.sigma)) for table in tables)


def cost(shards: ShardSet, samples: np.ndarray, recipe: str) -> tuple[str, str, list[Claim]]:
    """Time a recipe's colors, and its whole views with and without them: a line of both tables, and claims."""
    views = RECIPES[recipe]
    encoded, tables = drawn(shards, samples, views)
    _, linear = drawn(shards, samples, replace(views, color="linear"))
    without = tuple(colorless(table) for table in tables)
    sharp = without_blur(without)
    plain = rendered(encoded, without, views.size)
    pictures = [[Image.fromarray(pixels) for pixels in of_view] for of_view in plain]
    tensors = [[F.pil_to_tensor(picture) for picture in of_view] for of_view in pictures]

    def by_opencv(tables: Sequence[ViewTable]) -> Callable[[], None]:
        def recolor_all() -> None:
            for pixels, table in zip(plain.copy(), tables, strict=True):
                for row in range(len(samples)):
                    recolor(table, row, pixels[row])

        return recolor_all

    def by_torchvision(images: Sequence[Sequence[Image.Image | torch.Tensor]]) -> None:
        for of_view, table in zip(images, tables, strict=True):
            for row, image in enumerate(of_view):
                adjusted = adjust(image, table, row)
                if table.solarize[row]:
                    F.solarize(adjusted, 128)

    seconds = alternate(
        {
            "ours": by_opencv(tables),
            "linear": by_opencv(linear),
            "Pillow": lambda: by_torchvision(pictures),
            "tensors": lambda: by_torchvision(tensors),
            "with": lambda: rendered(encoded, tables, views.size),
            "without": lambda: rendered(encoded, without, views.size),
            "sharp": lambda: rendered(encoded, sharp, views.size),
            "decoding": lambda: [decode(each) for each in encoded],
        },
        rounds=ROUNDS,
        device=torch.device("cpu"),
    )
    ms = {name: [1e3 * each / len(samples) for each in values] for name, values in seconds.items()}
    claims = [
        compare(f"colors of {recipe}: ours / {theirs}", ms["ours"], ms[theirs], unit="ms", less_is_better=True)
        for theirs in ("Pillow", "tensors")
    ]
    claims.append(
        compare(
            f"decoding and two {recipe} views: with colors / without",
            ms["with"],
            ms["without"],
            unit="ms",
            less_is_better=True,
            goal=SPEED_LEFT,
        )
    )
    medians = {name: median(values) for name, values in ms.items()}
    shown = ("ours", "linear", "Pillow", "tensors", "with", "without")
    share = 100 * (1 - claims[-1].ratio)
    line = f"| {recipe} | {' | '.join(f'{medians[name]:.2f}' for name in shown)} | {share:.0f}% |"
    so_far = [0.0, *(medians[name] for name in ("decoding", "sharp", "without", "with"))]
    stages = [later - earlier for earlier, later in pairwise(so_far)]
    by_stage = " | ".join(f"{each:.2f} ({100 * each / so_far[-1]:.0f}%)" for each in stages)
    return line, f"| {recipe} | {by_stage} |", claims


def distances(
    shards: ShardSet, beton: ShardSet | None, plain: ShardSet | None, samples: np.ndarray, recipe: str
) -> tuple[list[str], list[Claim]]:
    """Compare every backend's views with the authors': lines of the table, and claims."""
    views, lines, claims = (RECIPES | ALONE)[recipe], [], []
    theirs = views_of(shards, samples, views, "authors")
    for name, data, backend, color in contestants(shards, beton, plain):
        if recipe in ALONE and backend not in ("torch", "control"):
            continue
        made = views_of(data, samples, replace(views, color=color), backend)
        apart = np.abs(made.astype(np.int16) - theirs)
        of_views = np.sort(apart.mean(axis=(2, 3, 4)), axis=None)
        worst = of_views[-max(1, len(of_views) // 10) :].mean()
        lines.append(f"| {recipe} | {name} | {apart.mean():.2f} | {np.percentile(apart, 99):.0f} | {worst:.1f} |")
        print(lines[-1], flush=True)
        if recipe in RECIPES and color == "torchvision" and name != "control":
            what = f"distance from the authors' {recipe} views: {name}"
            claims.append(compare(what, [float(of_views.mean())], [GOAL], unit="levels", goal=1.0, less_is_better=True))
    return lines, claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    claims: list[Claim] = []
    lines = ["| | backend, `--views.color` | mean | 99th percentile | worst tenth of views |\n|---|---|---|---|---|"]
    times = ["| ms per sample | ours | linear | Pillow | tensors | decoding, both views | without colors | share |"]
    times.append("|---|---|---|---|---|---|---|---|")
    stages = ["| ms per sample | decoding | crop, resize, flip | blur | colors |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        packed = asked.shards or str(photograph_shards(Path(folder), num=asked.num, photos=asked.photos))
        shards, beton, plain = open_set(packed), None, None
        if not asked.shards:
            without = photograph_shards(Path(folder), num=asked.num, photos=asked.photos, mean_rgb=False)
            plain = open_set(without)
        if importlib.util.find_spec("ffcv"):
            beton = write_beton(packed, f"{folder}/all.beton", workers=1, progress=ProgressBars(enabled=False))
        num = min(asked.num, MOST, shards.num_samples)
        samples = np.linspace(0, shards.num_samples - 1, num).astype(np.int64)
        for recipe in RECIPES:
            line, by_stage, more = cost(shards, samples, recipe)
            print(line, by_stage, sep="\n", flush=True)
            times.append(line)
            stages.append(by_stage)
            claims += more
        for recipe in (*RECIPES, *ALONE):
            more_lines, more = distances(shards, beton, plain, samples, recipe)
            lines += more_lines
            claims += more
    tables = "\n\n".join("\n".join(each) for each in (lines, times, stages))
    print(f"\n{header()}; {num} photographs\n\n{tables}\n\n{claims_table(claims)}")
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
