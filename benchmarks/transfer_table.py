"""Detection and segmentation from random weights and from pretrained ones, on a set that two cores train in minutes.

    python benchmarks/transfer_table.py --out build/transfer

Pretrains by the recipe `demo` on patches of scikit-image's photographs, as `make demo` does, without labels. Then
trains a Faster R-CNN C4 and a dilated FCN from random weights and from the pretrained encoder, with the same settings
and seeds, on shapes with the textures of those photographs (`textured_shapes.py`). Interrupted, the same command goes
on. Writes results.md.
"""

import argparse
from pathlib import Path
from statistics import mean

from alternating import header
from demo_seeds import prepare, run_module
from textured_shapes import CLASSES, SIDE, write_set

from moco_fast.evaluation.result import Result, read_results
from moco_fast.transfer.compare import as_tables

_TRAIN, _TEST = 400, 100
_SHARED = ("--batch-size", "8", "--warmup-steps", "20", "--lr", "0.02")
_DETECT = (
    *("--preset", "voc-c4", "--train", "VOC2012/trainval", "--test", "VOC2012/test", "--steps", "160", "--group", "1"),
    *("--sides", "96", "112", "128", "--test-side", "112", "--anchor-sizes", "32", "48"),
    *("--regions", "16", "--precise-batches", "10"),
)
_SEGMENT = ("--preset", "voc-semantic", "--steps", "600", "--crop", "97", "--scales", "0.8", "1.6")


def transfer(task: str, options: tuple[str, ...], run: Path, folder: Path, *, num_seeds: int) -> list[Result]:
    """Train from each of the initial weights with every seed."""
    out = folder / task
    words = ["--data", str(folder / "data"), "--init", "random", str(run), "--seeds", str(num_seeds), "--out", str(out)]
    run_module("moco_fast.cli", "transfer", task, *words, *_SHARED, *options, "--device", "cpu")
    return read_results(out / "results.json")


def as_page(tables: list[list[Result]]) -> str:
    """Return all figures, seed by seed, and the loss of the first and of the last twentieth of the steps."""
    parts = [header(), "", f"{_TRAIN} training and {_TEST} test images of {SIDE} pixels, {len(CLASSES)} classes.", ""]
    for results in tables:
        titles = [figure.title for figure in results[0].figures.values()]
        parts += ["```", as_tables(results), "```", "", f"| from | seed | loss | {' | '.join(titles)} |"]
        parts += ["|---" * (3 + len(titles)) + "|"]
        for result in results:
            losses = [loss for _, loss in result.curves["loss"].points]
            share = max(1, len(losses) // 20)
            fell = f"{mean(losses[:share]):.2f} to {mean(losses[-share:]):.2f}, mean of the seeds"
            for number, seed in enumerate(result.seeds):
                values = (f"{100 * figure.by_seed[number]:.1f}" for figure in result.figures.values())
                loss = fell if number == 0 else ""
                parts.append(f"| {result.encoder['name']} | {seed} | {loss} | {' | '.join(values)} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Pretrain, train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/transfer"), help="folder for all that is written")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    run = folder / "run"
    run_module("moco_fast.train", "demo", "--data.shards", str(folder / "shards"), "--run.out", str(run))
    if not (folder / "data").is_dir():
        write_set(folder / "data", num_train=_TRAIN, num_test=_TEST)
    tasks = {"detect": _DETECT, "segment": _SEGMENT}
    tables = [transfer(task, options, run, folder, num_seeds=arguments.seeds) for task, options in tasks.items()]
    page = as_page(tables)
    (folder / "results.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
