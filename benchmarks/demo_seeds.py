"""What the demo learns, over several seeds: kNN of the trained encoder, of the same one untrained, and of raw pixels.

    python benchmarks/demo_seeds.py --out build/demo-seeds

Each seed is a whole run of the recipe `demo`; interrupted, the same command goes on where it was. Options after `--` go
to the training, as in `... --out build/try -- --optim.lr 0.1`. Writes results.json and results.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from moco_fast.config import Config
from moco_fast.encoders import Encoder
from moco_fast.evaluate.knn import evaluate_knn
from moco_fast.report.record import RunRecord, read_run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One seed. Accuracies are shares of the held-out samples."""

    seed: int
    raw_pixels: float
    untrained: float
    trained: float
    training_s: float
    samples_per_s: float


def run_module(module: str, *words: str) -> None:
    """Run `python -m module words`, its output going where ours goes."""
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """Cut and pack the demo's images, as `make demo` does; returns the folders of training and held-out shards."""
    run_module("moco_fast.demo", str(folder / "images"))
    shards = folder / "shards"
    for split in ("train", "val"):
        if not (shards / split / "manifest.json").is_file():
            run_module("shards.cli", "pack", str(folder / "images" / split), "--out", str(shards / split))
    return shards / "train", shards / "val"


def run_seed(seed: int, folder: Path, train: Path, val: Path, options: list[str]) -> Row:
    """Train with one seed and read the run's folder."""
    run = folder / f"seed-{seed}"
    words = ["demo", "--data.shards", str(train), "--eval.shards", str(val), "--run.out", str(run)]
    run_module("moco_fast.train", *words, "--run.seed", str(seed), *options)
    record = read_run(run)
    return Row(
        seed=seed,
        raw_pixels=top1_of_raw_pixels(record.config),
        untrained=record.evaluations[0]["knn/top1"],
        trained=record.evaluations[-1]["knn/top1"],
        training_s=record.last["time_s"],
        samples_per_s=median(line["samples_per_s"] for line in record.training),
    )


def top1_of_raw_pixels(config: Config) -> float:
    """Classify by the pixels themselves, with the run's settings."""
    assert config.eval.shards is not None
    num_values = 3 * config.views.size**2
    return evaluate_knn(
        Encoder(nn.Flatten(), nn.Identity(), feature_dim=num_values, dim=num_values),
        config.eval,
        bank_shards=config.data.shards,
        query_shards=config.eval.shards,
        size=config.views.size,
        device=torch.device("cpu"),
    ).top1


def as_markdown(rows: list[Row], record: RunRecord) -> str:
    """Write the table, and on what it was measured."""
    config, environment, measured = record.config, record.environment, record.evaluations[-1]
    means = [mean(getattr(row, name) for row in rows) for name in ("raw_pixels", "untrained", "trained")]
    table = "".join(
        f"| {row.seed} | {row.raw_pixels:.1%} | {row.untrained:.1%} | {row.trained:.1%} | {row.training_s:.0f} s | "
        f"{row.samples_per_s:.0f} |\n"
        for row in rows
    )
    return (
        f"`{config.model.encoder}`, {record.last['step']:,} steps of {config.data.batch_size} samples, views of "
        f"{config.views.size} pixels; kNN top-1, k = {config.eval.k}, {measured['knn/num_queries']:,} held-out samples "
        f"against {measured['knn/num_bank']:,}.\n"
        f"{environment['device']}, {environment['num_cpus']} CPUs, {environment['precision']}; torch "
        f"{metadata.version('torch')}, Python {platform.python_version()}.\n\n"
        "| seed | raw pixels | untrained | trained | training | samples/s |\n"
        "|---|---|---|---|---|---|\n"
        f"{table}| mean | {means[0]:.1%} | {means[1]:.1%} | {means[2]:.1%} | | |\n"
    )


def main() -> None:
    """Run every seed and write the table."""
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options = sys.argv[len(ours) + 2 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--out", type=Path, default=Path("build/demo-seeds"), help="folder for all that is written")
    arguments = parser.parse_args(ours)
    # As `make demo` has it: as many threads as cores are ours, and idle ones asleep, not spinning beside the loader's.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, val = prepare(arguments.out)
    rows = [run_seed(seed, arguments.out, train, val, options) for seed in arguments.seeds]
    table = as_markdown(rows, read_run(arguments.out / f"seed-{rows[-1].seed}"))
    (arguments.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    (arguments.out / "results.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
