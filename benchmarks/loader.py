"""Loaders side by side: two MoCo v2 views at 224 pixels, in alternating rounds of one run, as ratios.

    python benchmarks/loader.py                     # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/loader.py --photos FILE.tar   # on photographs of your own, or --shards DIR
    python benchmarks/loader.py --only torch dali pil [--json FILE] [--plot FILE] [--runs FILE] [--peers]
    make bench-loaders                              # all of them, each peer installed in build/bench-loaders

`torch`, `dali`, `ffcv` and `linear` (the torch backend with `--views.color linear`) are ours. The others are what a
user would take instead; each is a file in benchmarks/loaders and an entry of loaders/registry.py, which says how its
views differ from the recipe's. All read the same JPEGs from page cache, LitData and
mosaic streaming from their own formats. Every run is a process of its own.

Beside samples/s stands the processor time of all processes per sample: it depends less on what else the machine does.
`--runs FILE` keeps every run with machine, versions and data, as JSON.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from alternating import Claim, bars, claims_table, compare, header, processor, write_claims
from loaders.base import EncodedPhotos, Options
from loaders.fresh import Figures, measure_fresh
from loaders.registry import CONTESTANTS, is_installed
from photographs import photograph_shards

# What is promised of ours against a peer, and of the torch backend against the fastest peer (`--peers`).
GOALS = {("torch", "pil"): 4.0, ("dali", "pil"): 2.5, ("dali", "dali-stock"): 1.3}
GOALS |= {("torch", peer): 1.0 for peer in ("lightly", "tv2", "dali-stock")}
FASTEST = 1.0
# Ours, but not what a CPU gets by default.
OTHERS = [name for name, each in CONTESTANTS.items() if each.ours and name != "torch"]


def take_turns(names: list[str], options: Options, *, rounds: int, seconds: float) -> dict[str, list[Figures]]:
    """Figures of each contestant and round; a peer that fails in the first round is left out, and the page says why."""
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(runs):
            try:
                one = measure_fresh(name, options, seconds)
            except RuntimeError as error:
                if number or CONTESTANTS[name].ours:
                    raise
                remedy = f"; {CONTESTANTS[name].install}" if CONTESTANTS[name].needs else ""
                print(f"{name} is left out: it failed ({error}){remedy}", flush=True)
                del runs[name]
                continue
            runs[name].append(one)
            print(
                f"{name:<19}{one.samples_per_s:9.0f} samples/s{one.cpu_ms:8.2f} ms of processor time per sample",
                flush=True,
            )
    return runs


def claims_of(rates: dict[str, list[float]], size: int) -> list[Claim]:
    """Each of ours against each peer that was timed."""
    ours = [name for name in rates if CONTESTANTS[name].ours]
    pairs = [(one, peer) for one in ours for peer in peers_of(rates)]
    return [_claim(rates, size, one, peer, goal=GOALS.get((one, peer))) for one, peer in pairs]


def peer_claims_of(rates: dict[str, list[float]], size: int) -> list[Claim]:
    """Our torch backend against each peer, the fastest first: only that one is held to a goal."""
    fastest, *others = sorted(peers_of(rates), key=lambda peer: -statistics.median(rates[peer]))
    note = f", the fastest of {len(others) + 1} peers"
    first = _claim(rates, size, "torch", fastest, goal=FASTEST, note=note)
    return [first, *(_claim(rates, size, "torch", peer) for peer in others)]


def peers_of(rates: dict[str, list[float]]) -> list[str]:
    return [name for name in rates if not CONTESTANTS[name].ours]


def _claim(
    rates: dict[str, list[float]], size: int, ours: str, peer: str, *, goal: float | None = None, note: str = ""
) -> Claim:
    what = f"two views at {size} pixels: {ours} backend / {peer}{note}"
    return compare(what, rates[ours], rates[peer], unit="samples/s", goal=goal)


def versions_of(name: str) -> dict[str, str]:
    """Versions of what a contestant is made of."""
    return {package: metadata.version(package) for package in CONTESTANTS[name].packages}


def record(runs: dict[str, list[Figures]], options: Options, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything that another needs to compare figures, or to repeat them."""
    photos = EncodedPhotos(options.shards)
    digest, num_bytes = hashlib.sha256(), 0
    for number in range(len(photos)):
        digest.update(photos[number])
        num_bytes += len(photos[number])
    return {
        "machine": {
            "processor": processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "load": round(os.getloadavg()[0], 1),
            "kernel": platform.release(),
        },
        "software": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        "data": {
            "photos": len(photos),
            "mean_bytes": round(num_bytes / len(photos)),
            "sha256": digest.hexdigest(),
        },
        "settings": {
            "size": options.size,
            "batch_size": options.batch_size,
            "seconds": asked.seconds,
            "rounds": asked.rounds,
        },
        "contestants": {
            name: {
                "views": CONTESTANTS[name].views,
                "versions": versions_of(name),
                "runs": [asdict(one) for one in each],
            }
            for name, each in runs.items()
        },
    }


def figures_table(runs: dict[str, list[Figures]]) -> str:
    """Markdown: rate, cost and what each contestant is."""
    lines = ["| | samples/s, median (all) | ms of processor time per sample | what it is |", "|---|---|---|---|"]
    for name, each in runs.items():
        every = ", ".join(f"{one.samples_per_s:.0f}" for one in each)
        rate = statistics.median(one.samples_per_s for one in each)
        cost = statistics.median(one.cpu_ms for one in each)
        versions = ", ".join(f"{package} {version}" for package, version in versions_of(name).items())
        what = f"{CONTESTANTS[name].views}{f' ({versions})' if versions else ''}"
        lines.append(f"| {name} | {rate:.0f} ({every}) | {cost:.2f} | {what} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="these; all, unless it is given")
    parser.add_argument("--peers", action="store_true", help="of ours, the torch backend alone, against every peer")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--plot", type=Path, help="where to draw the rates")
    parser.add_argument("--runs", type=Path, help="where to keep every run with machine and versions, as JSON")
    asked = parser.parse_args()
    chosen = [name for name in asked.only or CONTESTANTS if not (asked.peers and name in OTHERS)]
    if asked.peers and ("torch" not in chosen or len(chosen) < 2):
        parser.error("--peers compares torch with others: --only has to name it and one of them")
    names = [name for name in chosen if is_installed(CONTESTANTS[name])]
    for name in chosen:
        if name not in names:
            print(f"{name} is left out; to have it: {CONTESTANTS[name].install}")
    with tempfile.TemporaryDirectory() as folder:
        shards = asked.shards or str(photograph_shards(Path(folder), num=300, photos=asked.photos))
        options = Options(shards, asked.size, asked.batch_size)
        runs = take_turns(names, options, rounds=asked.rounds, seconds=asked.seconds)
        if asked.runs:
            asked.runs.parent.mkdir(parents=True, exist_ok=True)
            asked.runs.write_text(json.dumps(record(runs, options, asked), indent=1) + "\n")
    print(f"\n{header()}; size {asked.size}, batch {asked.batch_size}, {asked.rounds} rounds of {asked.seconds:g} s\n")
    print(figures_table(runs))
    rates = {name: [one.samples_per_s for one in each] for name, each in runs.items()}
    claims = peer_claims_of(rates, asked.size) if asked.peers else claims_of(rates, asked.size)
    print(f"\n{claims_table(claims)}")
    write_claims(asked.json, claims)
    bars(asked.plot, {f"Two MoCo v2 views at {asked.size} pixels": rates}, unit="samples/s")


if __name__ == "__main__":
    main()
