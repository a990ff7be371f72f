"""What the demo learns: kNN of the trained encoder, of the untrained one, and of raw pixels, and how far runs differ.

    python benchmarks/demo_seeds.py --out build/demo-seeds

Each seed is run with each number of threads: other threads add the same sums in another order, as other machines do.
Each is a whole run of the recipe `demo`, without labels; only the evaluation afterwards has them, as in `make demo`.
Interrupted, the same command goes on where it was. Options after `--` go to the training, as in `... --out build/try --
--optim.lr 0.1`. Writes results.json and results.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import RunSets
from moco_fast.evaluation.packed import open_data
from moco_fast.evaluation.registry import open_evaluation
from moco_fast.evaluation.result import read_results
from moco_fast.report.record import read_run
from pipelines.world import World


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Accuracies are shares of the held-out samples."""

    seed: int
    threads: int
    raw_pixels: float
    untrained: float
    trained: float
    training_s: float


def run_module(module: str, *words: str, threads: int | None = None) -> None:
    """Run `python -m module words`, its output going where ours goes."""
    # As `make demo` has it: as many threads as cores are ours, and idle ones asleep, not spinning beside the loader's.
    num_threads = threads or len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)


def prepare(folder: Path) -> Path:
    """Cut the demo's images and pack them without labels, as `make demo` does; returns the folder of images."""
    images, shards = folder / "images", folder / "shards"
    run_module("moco_fast.demo", str(images))
    if not (shards / "manifest.json").is_file():
        run_module("shards.cli", "pack", str(images / "train"), "--labels", "none", "--out", str(shards))
    return images


def run_folder(seed: int, threads: int, folder: Path) -> Path:
    """Where a run lives."""
    return folder / f"seed-{seed}-threads-{threads}"


def run_seed(seed: int, threads: int, folder: Path, images: Path, options: list[str]) -> Row:
    """Train with one seed and number of threads, measure with labels, and read what was found."""
    run = run_folder(seed, threads, folder)
    words = ["demo", "--data.shards", str(folder / "shards"), "--eval.tasks", "health", "--run.out", str(run)]
    run_module("moco_fast.train", *words, "--run.seed", str(seed), *options, threads=threads)
    words = ["eval", "knn", "--encoder", str(run), "--beside", "untrained", "--cache", str(folder / "cache")]
    sets = ["--train", str(images / "train"), "--test", str(images / "val"), "--out", str(run / "knn.json")]
    run_module("moco_fast.cli", *words, *sets)
    trained, untrained = read_results(run / "knn.json")
    record = read_run(run)
    return Row(
        seed=seed,
        threads=threads,
        raw_pixels=top1_of_raw_pixels(record.config, images, folder / "cache"),
        untrained=untrained.headline.value,
        trained=trained.headline.value,
        training_s=record.last["time_s"],
    )


def top1_of_raw_pixels(config: Config, images: Path, cache: Path) -> float:
    """Classify by the pixels themselves, with the run's settings."""
    num_values = 3 * config.views.size**2
    pixels = Encoder(nn.Flatten(), nn.Identity(), feature_dim=num_values, dim=num_values)
    training, held_out = (open_data(str(images / split), cache=cache) for split in ("train", "val"))
    evaluated = replace(config, eval=replace(config.eval, tasks=("knn",)))
    evaluation = open_evaluation(evaluated, RunSets(training=training, held_out=held_out))
    assert evaluation is not None
    return evaluation.figures(pixels, device=torch.device("cpu"), world=World())["knn/top1"]


def as_markdown(rows: list[Row], run: Path) -> str:
    """Write the table, and on what it was measured."""
    record, facts = read_run(run), read_results(run / "knn.json")[0].facts
    config, environment = record.config, record.environment
    table = "".join(
        f"| {row.seed} | {row.threads} | {row.raw_pixels:.1%} | {row.untrained:.1%} | {row.trained:.1%} | "
        f"{row.training_s:.0f} s |\n"
        for row in rows
    )
    columns = [[getattr(row, name) for row in rows] for name in ("raw_pixels", "untrained", "trained")]
    for title, summary in (("lowest", min), ("mean", mean), ("highest", max)):
        table += f"| {title} | | " + " | ".join(f"{summary(column):.1%}" for column in columns) + " | |\n"
    by_seed = [[row.trained for row in rows if row.seed == seed] for seed in dict.fromkeys(row.seed for row in rows)]
    spread = stdev(columns[2]) if len(rows) > 1 else 0.0
    apart = max(max(trained) - min(trained) for trained in by_seed)
    return (
        f"`{config.model.encoder}`, {record.last['step']:,} steps of {config.data.batch_size} samples, views of "
        f"{config.views.size} pixels, {config.views.color} colors; kNN top-1, k = {config.eval.k}, "
        f"{facts['num_queries']:,} held-out samples against {facts['num_bank']:,}.\n"
        f"{environment['device']}, {environment['num_cpus']} CPUs, {environment['precision']}; torch "
        f"{metadata.version('torch')}, Python {platform.python_version()}.\n\n"
        "| seed | threads | raw pixels | untrained | trained | training |\n"
        "|---|---|---|---|---|---|\n"
        f"{table}\n"
        f"Standard deviation of the trained: {100 * spread:.1f} points; runs of one seed with other numbers "
        f"of threads are up to {100 * apart:.1f} points apart.\n"
    )


def main() -> None:
    """Run every seed and write the table."""
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options = sys.argv[len(ours) + 2 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch; a run for each and each seed")
    parser.add_argument("--out", type=Path, default=Path("build/demo-seeds"), help="folder for all that is written")
    arguments = parser.parse_args(ours)
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = prepare(arguments.out)
    runs = list(product(arguments.seeds, arguments.threads))
    rows = [run_seed(seed, threads, arguments.out, images, options) for seed, threads in runs]
    table = as_markdown(rows, run_folder(*runs[-1], arguments.out))
    (arguments.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    (arguments.out / "results.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
