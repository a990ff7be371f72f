"""What storing images smaller costs in accuracy: kNN of encoders that were trained on each stored size, at equal steps.

    python benchmarks/stored_accuracy.py                        # patches of the demo's photographs, cut larger
    python benchmarks/stored_accuracy.py --cifar ARCHIVE        # CIFAR-10 as files, split/class/number.jpg

All sizes are a quarter of ImageNet's: patches of 96 pixels, stored as they are and at 80, 64 and 56, and views of 56,
as photographs of 384 pixels would be at 320, 256 and 224, with views of 224. CIFAR-10's images have no pixel more than
a view: they show what storing below the views' size costs. Training and test images are stored alike, and a seed's runs
have the same batches. Interrupted, the same command goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from alternating import header
from cifar_files import unpack_cifar
from demo_seeds import run_module

from moco_fast.evaluation.result import read_results

FULL = "full"
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images by split and class, and how an encoder is trained on them."""

    images: Path
    sides: tuple[int, ...]
    """To which they are stored beside their own size."""
    words: tuple[str, ...]
    """Of the training."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    side: str
    seed: int
    trained: float
    """kNN top-1 of held-out images, a share."""
    untrained: float
    num_bytes: int
    """Of the training images as stored."""


def stored(source: Source, side: int | None, folder: Path) -> dict[str, Path]:
    """Pack both splits at a stored size; return their folders."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        shards = folder / str(side or FULL) / split
        if not (shards / "manifest.json").is_file():
            resize = [] if side is None else ["--resize", str(side)]
            run_module("shards.cli", "pack", str(source.images / split), "--out", str(shards), *resize)
        found[split] = shards
    return found


def run(source: Source, side: int | None, seed: int, folder: Path) -> Row:
    """Train on a stored size and measure on images that are stored alike."""
    name, shards = str(side or FULL), stored(source, side, folder)
    out = folder / name / f"seed-{seed}"
    if not (out / "knn.json").is_file():
        words = [*source.words, "--data.shards", str(shards["train"]), "--run.out", str(out), "--run.seed", str(seed)]
        run_module("moco_fast.train", *words, "--log.trackers")
        words = ["eval", "knn", "--encoder", str(out), "--beside", "untrained", "--cache", str(folder / "cache")]
        sets = ["--train", str(shards["train"]), "--test", str(shards["val"]), "--out", str(out / "knn.json")]
        run_module("moco_fast.cli", *words, *sets)
    trained, untrained = read_results(out / "knn.json")
    num_bytes = sum(path.stat().st_size for path in shards["train"].glob("*.tar"))
    top1, before = trained.headline.value, untrained.headline.value
    return Row(side=name, seed=seed, trained=top1, untrained=before, num_bytes=num_bytes)


def as_markdown(rows: Sequence[Row]) -> str:
    """Write a line for each stored size, all seeds in it."""
    lines = [
        "| stored at | shard bytes | kNN top-1, mean (each seed) | untrained | against full |",
        "|---|---|---|---|---|",
    ]
    full = {row.seed: row for row in rows if row.side == FULL}
    for side in dict.fromkeys(row.side for row in rows):
        of_side = [row for row in rows if row.side == side]
        accuracies = ", ".join(f"{row.trained:.1%}" for row in of_side)
        differences = [100 * (row.trained - full[row.seed].trained) for row in of_side]
        against = (
            "" if side == FULL else f"{mean(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"
        )
        share = of_side[0].num_bytes / full[of_side[0].seed].num_bytes
        lines.append(
            f"| {side} | {share:.0%} | {mean(row.trained for row in of_side):.1%} ({accuracies}) | "
            f"{mean(row.untrained for row in of_side):.1%} | {against} |"
        )
    return "\n".join(lines)


def source_of(options: argparse.Namespace) -> Source:
    """Write the images that are asked for."""
    images, steps = options.out / "images", ("--run.steps", str(options.steps))
    if options.cifar is not None:
        for split, name in zip(("train", "test"), SPLITS, strict=True):
            unpack_cifar(options.cifar, split, images / name, of_class=options.of_class)
        small = ("--model.encoder", "resnet18_quarter", "--model.stem", "cifar", "--data.batch-size", "128")
        return Source(images=images, sides=(28, 24, 16), words=("cifar10", *small, *steps))
    cut = ("--size", "96", "--num-train", str(options.of_class), "--num-held-out", str(options.of_class // 4))
    run_module("moco_fast.demo", str(images), *cut)
    return Source(images=images, sides=(80, 64, 56), words=("demo", "--views.size", "56", *steps))


def main() -> None:
    """Run every stored size and seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--of-class", type=int, default=128, help="training images of each class")
    parser.add_argument("--cifar", type=Path, help="archive of CIFAR-10 as files")
    parser.add_argument(
        "--out", type=Path, default=Path("build/stored-accuracy"), help="folder for all that is written"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source = source_of(options)
    rows = [run(source, side, seed, options.out) for seed in options.seeds for side in (None, *source.sides)]
    (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    what = f"{options.steps:,} steps, {options.of_class} training images of each class"
    table = f"{header('cpu')}; {what}\n\n{as_markdown(rows)}"
    (options.out / "results.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
