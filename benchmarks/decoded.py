"""Decoded cache: samples/s of the torch backend with and without `--data.cache-decoded`, by turns in one run.

    python benchmarks/decoded.py [--photos FILE.tar] [--in FOLDER] --json build/decoded.json

Two MoCo v2 views at 224 pixels. Each round times an epoch without the cache, then the first epoch of an empty cache,
which fills it, and a later one, whose pixels are all there. Processor time is that of this process and its workers,
which are running when an epoch is timed.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
from alternating import claims_table, compare, header, write_claims
from photographs import photograph_shards

from pipelines.config import VIEWS, DataConfig
from pipelines.loader import Loader, open_loader
from shards.sets import open_set

GOAL = 2.0


def processor_s() -> float:
    """Return the processor time of this process and its workers so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def epochs(loader: Loader, num: int) -> list[tuple[float, float]]:
    """Return samples/s and ms of processor time per sample of each of `num` epochs.

    The first four batches of each are left out, for the workers may have made them before.
    """
    found: list[tuple[float, float]] = []
    for _ in range(num):
        marks: list[tuple[float, float]] = []
        for number, _ in enumerate(loader):
            if number in (3, len(loader) - 1):
                marks.append((time.perf_counter(), processor_s()))
        num_samples = (len(loader) - 4) * loader.batch_size
        [(wall_s, cpu_s)] = [(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairwise(marks)]
        found.append((num_samples / wall_s, 1e3 * cpu_s / num_samples))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--in", dest="folder", type=Path, help="where pixels are kept; a temporary folder otherwise")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"without": [], "filling": [], "kept": []}
    with tempfile.TemporaryDirectory() as temporary:
        shards = photograph_shards(Path(temporary), num=400, photos=options.photos)
        data, num_bytes = DataConfig(shards=str(shards), batch_size=options.batch_size, backend="torch"), 0
        for _ in range(options.rounds):
            with open_loader(data, VIEWS["moco-v2"], seed=1) as loader:
                rows["without"].append(epochs(loader, 1)[0])
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                kept = replace(data, cache_decoded=2.0, cache_decoded_in=folder)
                with open_loader(kept, VIEWS["moco-v2"], seed=1) as loader:
                    filling, later = epochs(loader, 2)
                [file] = Path(folder).iterdir()
                num_bytes = file.stat().st_size
            rows["filling"].append(filling)
            rows["kept"].append(later)
        num_samples = open_set(shards).num_samples
    rates = {name: [rate for rate, _ in found] for name, found in rows.items()}
    costs = {name: [cost for _, cost in found] for name, found in rows.items()}
    claims = [
        compare(
            "a later epoch with decoded pixels kept / without",
            rates["kept"],
            rates["without"],
            unit="samples/s",
            goal=GOAL,
        ),
        compare("the epoch that fills the cache / without", rates["filling"], rates["without"], unit="samples/s"),
        compare(
            "processor time, a later epoch with decoded pixels kept / without",
            costs["kept"],
            costs["without"],
            unit="ms per sample",
            less_is_better=True,
        ),
    ]
    print(f"{header()}; {num_samples:,} photographs, {num_bytes / num_samples / 1000:.0f} kB of pixels each\n")
    print("| | samples/s, median (all) | ms of processor time per sample |\n|---|---|---|")
    for name in rows:
        every = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(f"| {name} | {statistics.median(rates[name]):.0f} ({every}) | {statistics.median(costs[name]):.2f} |")
    print(f"\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
