"""Stored sizes side by side: what photographs take on disk and how fast their MoCo v2 views are made.

    python benchmarks/stored_size.py                     # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/stored_size.py --photos FILE.tar   # on photographs of your own
    python benchmarks/stored_size.py --sides 512 256 [--json FILE]

The same photographs are packed as they are (`full`) and once for each of `--sides`, shrunk to so many pixels on the
shorter side (`make-shards pack --resize`). The torch backend then makes two views of 224 pixels of each set, by turns.
The second table says where the time goes: each stage alone, on one thread, in its fastest round.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from alternating import Claim, alternate, claims_table, compare, header, write_claims
from color import colorless, drawn, rendered, without_blur
from loaders.base import Options
from loaders.fresh import measure_fresh
from photographs import photograph_shards

from pipelines.backends.colors import recolor
from pipelines.backends.pixels import decode, finish, render
from pipelines.config import VIEWS
from shards.sets import ShardSet, open_set

FULL = "full"
# What the loader has to gain at 256 pixels.
GOALS = {256: 1.8}
STAGES = ("decoding", "crop, resize, flip", "blur", "colors")


def pack(source: Path, out: Path, side: int | None) -> Path:
    """Pack photographs as they are, or shrunk to `side` pixels on the shorter side."""
    resize = [] if side is None else ["--resize", str(side)]
    command = [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())"]
    words = [*command, "pack", str(source), "--out", str(out), "--labels", "none", *resize]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return out


def records_of(shards: ShardSet) -> np.ndarray:
    """Return the records of all samples."""
    return np.concatenate([shards.index(shard) for shard in range(shards.num_shards)])


def stages_of(shards: ShardSet, samples: np.ndarray, rounds: int) -> list[float]:
    """Return the milliseconds that STAGES take for a sample's two views, on this thread, in their fastest round."""
    views = VIEWS["moco-v2"]
    encoded, tables = drawn(shards, samples, views)
    plain = tuple(colorless(table) for table in tables)
    sharp = without_blur(plain)
    images = [decode(each) for each in encoded]
    out = rendered(encoded, sharp, views.size)

    def of_all(do: Callable[[int, int], None]) -> Callable[[], None]:
        def do_all() -> None:
            for row in range(len(samples)):
                for view in range(len(tables)):
                    do(view, row)

        return do_all

    seconds = alternate(
        {
            "decoding": lambda: [decode(each) for each in encoded],
            "crop, resize, flip": of_all(lambda view, row: render(images[row], sharp[view], row, out[view, row])),
            "blur": of_all(lambda view, row: finish(plain[view], row, out[view, row])),
            "colors": of_all(lambda view, row: recolor(tables[view], row, out[view, row])),
        },
        rounds=rounds,
        device=torch.device("cpu"),
    )
    return [1e3 * min(seconds[stage]) / len(samples) for stage in STAGES]


def enlarged(shards: ShardSet, samples: np.ndarray) -> float:
    """Return the share of MoCo v2's crops that have fewer pixels than a view."""
    views = VIEWS["moco-v2"]
    _, tables = drawn(shards, samples, views)
    areas = np.concatenate([table.box[:, 2:].astype(np.int64).prod(axis=1) for table in tables])
    return float((areas < views.size**2).mean())


def claims_of(rates: dict[str, list[float]], costs: dict[str, list[float]], num_bytes: dict[str, float]) -> list[Claim]:
    """Compare every smaller size with the full one: loader, processor time and bytes."""
    claims: list[Claim] = []
    for name in (name for name in rates if name != FULL):
        goal = GOALS.get(int(name))
        what = f"photos stored at {name} pixels / as they are"
        claims.append(compare(f"{what}: loader", rates[name], rates[FULL], unit="samples/s", goal=goal))
        time = f"{what}: processor time per sample"
        claims.append(compare(time, costs[name], costs[FULL], unit="ms", less_is_better=True))
        claims.append(
            compare(f"{what}: bytes", [num_bytes[name] / 1e3], [num_bytes[FULL] / 1e3], unit="kB", less_is_better=True)
        )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="tar of photographs in place of scikit-image's")
    parser.add_argument("--sides", type=int, nargs="+", default=[320, 256], help="pixels of the shorter side")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=100, help="samples of the second table")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    sides = {FULL: None} | {str(side): side for side in asked.sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    costs: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        source = asked.photos
        if source is None:
            photograph_shards(Path(folder), num=300)
            source = Path(folder) / "photographs"
        paths = {name: pack(source, Path(folder) / name, side) for name, side in sides.items()}
        records = {name: records_of(open_set(path)) for name, path in paths.items()}
        for _ in range(asked.rounds):
            for name, path in paths.items():
                figures = measure_fresh("torch", Options(str(path), 224, 64), asked.seconds)
                rate, cost = figures.samples_per_s, figures.cpu_ms
                rates[name].append(rate)
                costs[name].append(cost)
                print(f"{name:<8}{rate:9.0f} samples/s{cost:8.2f} ms of processor time per sample", flush=True)
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        stages: dict[str, list[float]] = {}
        shares: dict[str, float] = {}
        for name, path in paths.items():
            shards = open_set(path)
            samples = np.linspace(0, shards.num_samples - 1, min(asked.num, shards.num_samples)).astype(np.int64)
            stages[name] = stages_of(shards, samples, asked.rounds)
            shares[name] = enlarged(shards, np.arange(shards.num_samples))
    num_bytes = {name: float(each["size"].mean()) for name, each in records.items()}
    pixels = {name: float((each["width"].astype(np.int64) * each["height"]).mean()) for name, each in records.items()}
    print(f"\n{header()}; {len(records[FULL])} photographs, {asked.rounds} rounds of {asked.seconds:g} s\n")
    print("| shorter side | pixels | kB | samples/s, median (all) | ms of processor time per sample | crops enlarged |")
    print("|---|---|---|---|---|---|")
    for name in sides:
        every_rate = ", ".join(f"{rate:.0f}" for rate in rates[name])
        sizes = (
            f"{pixels[name] / pixels[FULL]:.0%} | {num_bytes[name] / 1e3:.0f} ({num_bytes[name] / num_bytes[FULL]:.0%})"
        )
        speed = f"{median(rates[name]):.0f} ({every_rate}) | {median(costs[name]):.2f}"
        print(f"| {name} | {sizes} | {speed} | {shares[name]:.0%} |")
    print(f"\n| ms per sample, one thread | {' | '.join(STAGES)} | all |")
    print("|---|" + "---|" * (len(STAGES) + 1))
    for name, each in stages.items():
        print(f"| {name} | {' | '.join(f'{ms:.2f}' for ms in each)} | {sum(each):.2f} |")
    claims = claims_of(rates, costs, num_bytes)
    print(f"\n{claims_table(claims)}")
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
