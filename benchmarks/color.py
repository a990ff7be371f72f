"""How far each backend's views are from the MoCo authors' Pillow pipeline, on the recipes' own crops of photographs.

    python benchmarks/color.py --photos FILE.tar [--num 100] [--json FILE]

The same parameters are drawn for both; theirs is Pillow and torchvision's transforms in the authors' order (crop,
jitter, grayscale, blur, solarize, flip; v1: grayscale first). Differences are in levels of 0..255, over both views, for
whole recipes and for single operations of the jitter. `control`: torchvision's operations on uint8 tensors in place of
Pillow images. FFCV is left out where it is not installed.
"""

import argparse
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as F
from alternating import Claim, claims_table, compare, header, write_claims
from PIL import Image, ImageFilter, ImageOps

from pipelines.config import VIEWS, ViewConfig, ViewsConfig
from pipelines.loader import make_views
from pipelines.plan.augment import ViewTable
from pipelines.reading.reader import Reader
from pipelines.reading.samples import draw_training
from shards.config import PackConfig
from shards.ground.progress import ProgressBars
from shards.packing.pack import pack
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


def views_of(shards: ShardSet, samples: np.ndarray, views: ViewsConfig, backend: str) -> np.ndarray:
    """(2, n, size, size, 3) uint8 by a backend of ours, or by the authors' pipeline or the control."""
    if backend not in ("authors", "control"):
        made = make_views(shards, samples, views, seed=3, epoch=0, backend=backend)
        return np.stack([view.permute(0, 2, 3, 1).numpy() for view in made])
    reader = Reader(shards, num_threads=1)
    records = reader.records(samples)
    encoded = reader.submit(samples, records).result()
    reader.close()
    tables = draw_training(0, samples, records, views=views, seed=3)
    tensors = backend == "control"
    made = [
        [by_authors(each, table, row, views.size, tensors=tensors) for row, each in enumerate(encoded)]
        for table in tables
    ]
    return np.array(made)


def contestants(shards: ShardSet, beton: ShardSet | None) -> Iterator[tuple[str, ShardSet, str, str]]:
    """Give (name, data, backend, views.color)."""
    for color in ("torchvision", "linear"):
        yield f"torch, {color}", shards, "torch", color
        yield f"dali on the CPU, {color}", shards, "dali", color
        if beton is not None:
            yield f"ffcv, {color}", beton, "ffcv", color
    yield "control", shards, "control", "torchvision"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="tar or folder of photographs")
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    claims: list[Claim] = []
    lines = ["| | backend, `--views.color` | mean | 99th percentile | worst tenth of views |\n|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        pack(PackConfig(sources=(asked.photos,), out=f"{folder}/shards", shuffle=False))
        shards, beton = open_set(f"{folder}/shards"), None
        if importlib.util.find_spec("ffcv"):
            beton = write_beton(
                f"{folder}/shards", f"{folder}/all.beton", workers=1, progress=ProgressBars(enabled=False)
            )
        num = min(asked.num, MOST, shards.num_samples)
        samples = np.linspace(0, shards.num_samples - 1, num).astype(np.int64)
        for recipe, views in (RECIPES | ALONE).items():
            theirs = views_of(shards, samples, views, "authors")
            for name, data, backend, color in contestants(shards, beton):
                if recipe in ALONE and not name.startswith(("torch", "control")):
                    continue
                made = views_of(data, samples, replace(views, color=color), backend)
                apart = np.abs(made.astype(np.int16) - theirs)
                of_views = np.sort(apart.mean(axis=(2, 3, 4)), axis=None)
                worst = of_views[-max(1, len(of_views) // 10) :].mean()
                lines.append(
                    f"| {recipe} | {name} | {apart.mean():.2f} | {np.percentile(apart, 99):.0f} | {worst:.1f} |"
                )
                print(lines[-1], flush=True)
                if recipe in RECIPES and color == "torchvision" and name != "control":
                    what = f"distance from the authors' {recipe} views: {name}"
                    claims.append(
                        compare(what, [float(of_views.mean())], [GOAL], unit="levels", goal=1.0, less_is_better=True)
                    )
    print(f"\n{header()}; {num} photographs\n\n" + "\n".join(lines) + f"\n\n{claims_table(claims)}")
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
