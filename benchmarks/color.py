"""How far the linear color map is from torchvision's ColorJitter, on photographs, and where.

    python benchmarks/color.py --photos FILE.tar [--num 300] [--json FILE]

The same parameters are drawn for both (MoCo v2's strengths, jitter always on, no blur, no flip, the whole photo at 224
pixels); differences are in levels of 0..255. `jitter itself` is how far torchvision's jitter moves a pixel.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from alternating import Claim, claims_table, compare, header, write_claims

from pipelines.config import ViewConfig, ViewsConfig
from pipelines.pixels import decode, render, render_as_torchvision
from pipelines.samples import draw_training
from shards import ShardSet
from shards.config import PackConfig
from shards.pack import pack

STILL = ViewConfig(crop_scale=(1.0, 1.0), flip_p=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
JITTER = replace(STILL, jitter_p=1.0)
HUE = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
CASES = {
    "MoCo v2's jitter": JITTER,
    "without hue": replace(JITTER, hue=0.0),
    "hue alone": replace(JITTER, **HUE),
}


def pixels(shards: ShardSet, view: ViewConfig, color: str, num: int) -> np.ndarray:
    """(num, 224, 224, 3) uint8 of photos spread over the set's first shard, as the torch backend makes them."""
    rows = np.linspace(0, shards.shard_sizes[0] - 1, num).astype(np.int64)
    records = shards.index(0)[rows]
    table, _ = draw_training(0, rows, records, views=ViewsConfig(query=view, key=STILL), seed=0)
    out = np.empty((num, 224, 224, 3), dtype=np.uint8)
    with shards.shard_path(0).open("rb") as file:
        for row, record in enumerate(records):
            file.seek(int(record["offset"]))
            image = decode(np.frombuffer(file.read(int(record["size"])), np.uint8))
            if color == "torchvision":
                render_as_torchvision(image, table, row, out[row], grayscale_first=view.grayscale_first)
            else:
                render(image, table, row, out[row])
    return out


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean difference of each pixel over its channels, (num, 224, 224)."""
    return np.abs(one.astype(np.int16) - other).mean(axis=3)


def where(difference: np.ndarray, original: np.ndarray) -> str:
    """Mean difference by how colorful the original's pixel is: HSV's saturation."""
    highest, lowest = (original.astype(np.float32).max(axis=3), original.astype(np.float32).min(axis=3))
    saturation = (highest - lowest) / np.maximum(highest, 1)
    bounds = (0.0, 0.15, 0.5, 1.01)
    means = [difference[(low <= saturation) & (saturation < high)].mean() for low, high in pairwise(bounds)]
    return " | ".join(f"{mean:.1f}" for mean in means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="tar or folder of photographs")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    claims: list[Claim] = []
    lines = [
        "| | mean | of the worst tenth | gray pixels | between | vivid | jitter itself |\n|---|---|---|---|---|---|---|"
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, mean_rgb in (("known", True), ("unknown", False)):
            pack(PackConfig(sources=(asked.photos,), out=f"{folder}/{name}", mean_rgb=mean_rgb, shuffle=False))
        known, unknown = (ShardSet.open(f"{folder}/{name}") for name in ("known", "unknown"))
        num = min(asked.num, int(known.shard_sizes[0]))
        original = pixels(known, STILL, "linear", num)
        for case, view in CASES.items():
            exact = pixels(known, view, "torchvision", num)
            moved = apart(exact, original)
            for what, shards in ((case, known), (f"{case}, mean color unknown", unknown)):
                difference = apart(pixels(shards, view, "linear", num), exact)
                of_photos = difference.mean(axis=(1, 2))
                worst = np.sort(of_photos)[-max(1, num // 10) :].mean()
                figures = f"{of_photos.mean():.1f} | {worst:.1f} | {where(difference, original)} | {moved.mean():.1f}"
                lines.append(f"| {what} | {figures} |")
                claims.append(
                    compare(
                        f"distance from torchvision's colors: {what} / leaving colors alone",
                        [float(of_photos.mean())],
                        [float(moved.mean())],
                        unit="levels",
                        less_is_better=True,
                    )
                )
    print(f"{header()}; {num} photographs\n\n" + "\n".join(lines) + f"\n\n{claims_table(claims)}")
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
