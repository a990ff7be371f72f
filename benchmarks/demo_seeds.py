"""What the demo learns: kNN of the trained encoder, of the untrained one, and of raw pixels, and how far runs differ.

    python benchmarks/demo_seeds.py --out build/demo-seeds

Each seed is run with each number of threads: other threads add the same sums in another order, as other machines do.
Each is a whole run of the recipe `demo`; interrupted, the same command goes on where it was. Options after `--` go to
the training, as in `... --out build/try -- --optim.lr 0.1`. Writes results.json and results.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.registry import open_evaluation
from moco_fast.report.record import RunRecord, read_run
from moco_fast.training.build import open_sets
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


def prepare(folder: Path) -> tuple[Path, Path]:
    """Cut and pack the demo's images, as `make demo` does; returns the folders of training and held-out shards."""
    run_module("moco_fast.demo", str(folder / "images"))
    shards = folder / "shards"
    for split in ("train", "val"):
        if not (shards / split / "manifest.json").is_file():
            run_module("shards.cli", "pack", str(folder / "images" / split), "--out", str(shards / split))
    return shards / "train", shards / "val"


def run_folder(seed: int, threads: int, folder: Path) -> Path:
    """Where a run lives."""
    return folder / f"seed-{seed}-threads-{threads}"


def run_seed(seed: int, threads: int, folder: Path, train: Path, val: Path, options: list[str]) -> Row:
    """Train with one seed and number of threads, and read the run's folder."""
    run = run_folder(seed, threads, folder)
    words = ["demo", "--data.shards", str(train), "--eval.shards", str(val), "--run.out", str(run)]
    run_module("moco_fast.train", *words, "--run.seed", str(seed), *options, threads=threads)
    record = read_run(run)
    return Row(
        seed=seed,
        threads=threads,
        raw_pixels=top1_of_raw_pixels(record.config),
        untrained=record.evaluations[0]["knn/top1"],
        trained=record.evaluations[-1]["knn/top1"],
        training_s=record.last["time_s"],
    )


def top1_of_raw_pixels(config: Config) -> float:
    """Classify by the pixels themselves, with the run's settings."""
    num_values = 3 * config.views.size**2
    pixels = Encoder(nn.Flatten(), nn.Identity(), feature_dim=num_values, dim=num_values)
    evaluation = open_evaluation(config, open_sets(config))
    assert evaluation is not None
    return evaluation.figures(pixels, device=torch.device("cpu"), world=World())["knn/top1"]


def as_markdown(rows: list[Row], record: RunRecord) -> str:
    """Write the table, and on what it was measured."""
    config, environment, measured = record.config, record.environment, record.evaluations[-1]
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
        f"{measured['knn/num_queries']:,} held-out samples against {measured['knn/num_bank']:,}.\n"
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
    train, val = prepare(arguments.out)
    runs = list(product(arguments.seeds, arguments.threads))
    rows = [run_seed(seed, threads, arguments.out, train, val, options) for seed, threads in runs]
    table = as_markdown(rows, read_run(run_folder(*runs[-1], arguments.out)))
    (arguments.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    (arguments.out / "results.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
