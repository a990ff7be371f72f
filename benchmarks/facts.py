"""The paper's known facts on a small problem with real images: m, K, shuffling, mechanisms.

    python benchmarks/facts.py --train SHARDS --val SHARDS --out build/facts [--steps 1000 --seeds 0 1 2]

Every row is a whole run of the recipe `demo` with one option changed; interrupted, the same command goes on where it
was. Writes results.md and facts.svg: kNN top-1 and the accuracy of the contrastive task at the end, mean over seeds.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import matplotlib as mpl

from moco_fast.report.record import read_run

FACTS: dict[str, dict[str, list[str]]] = {
    "momentum m": {m: ["--moco.momentum", m] for m in ("0.0", "0.9", "0.99", "0.999")},
    "dictionary size K": {k: ["--moco.queue-size", k] for k in ("128", "512", "2048", "8192")},
    "batch statistics": {policy: ["--bn.policy", policy] for policy in ("virtual", "none")},
    "mechanism": {
        "queue": [],
        "end-to-end": ["--moco.dictionary", "batch", "--moco.key-encoder", "query"],
        "memory bank": ["--moco.dictionary", "bank"],
        "symmetric": ["--moco.loss", "symmetric"],
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of one option, over seeds."""

    fact: str
    value: str
    top1: list[float]
    loss: list[float]
    accuracy: list[float]


def run(name: str, seed: int, words: list[str], options: argparse.Namespace) -> tuple[float, float, float]:
    """Train once; return kNN top-1, loss and contrastive accuracy at the end."""
    out = options.out / "runs" / f"{name.replace(' ', '-')}-seed-{seed}"
    command = [sys.executable, "-m", "moco_fast.train", "demo", "--data.shards", str(options.train)]
    command += ["--eval.shards", str(options.val), "--run.out", str(out), "--run.steps", str(options.steps)]
    subprocess.run([*command, "--run.seed", str(seed), *words, *options.also], check=True)
    record = read_run(out)
    last = record.training[-1]
    return record.evaluations[-1]["knn/top1"], last["loss"], last["accuracy"]


def as_markdown(rows: list[Row]) -> str:
    """Write the table."""
    lines = ["| | | kNN top-1 | spread | loss | contrastive accuracy |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{mean(row.top1):.1%} | {pstdev(row.top1):.1%} | {mean(row.loss):.3f} | {mean(row.accuracy):.1%}"
        lines.append(f"| {row.fact} | {row.value} | {numbers} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Bars of kNN top-1, one panel a fact."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    facts = list(dict.fromkeys(row.fact for row in rows))
    figure, panels = plt.subplots(1, len(facts), figsize=(3 * len(facts), 3), sharey=True, squeeze=False)
    for fact, axes in zip(facts, panels[0], strict=True):
        shown = [row for row in rows if row.fact == fact]
        heights, spreads = [mean(row.top1) for row in shown], [pstdev(row.top1) for row in shown]
        axes.bar([row.value for row in shown], heights, yerr=spreads, color="#4878a8")
        axes.set_title(fact)
        axes.tick_params(axis="x", labelrotation=30)
    panels[0][0].set_ylabel("kNN top-1")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of training shards")
    parser.add_argument("--val", type=Path, required=True, help="folder of held-out shards")
    parser.add_argument("--out", type=Path, default=Path("build/facts"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--facts", nargs="+", choices=FACTS, default=list(FACTS))
    parser.add_argument("also", nargs="*", help="options of the training, after --")
    options = parser.parse_args()
    rows: list[Row] = []
    for fact in options.facts:
        for value, words in FACTS[fact].items():
            results = [run(f"{fact} {value}", seed, words, options) for seed in options.seeds]
            top1, loss, accuracy = (list(column) for column in zip(*results, strict=True))
            rows.append(Row(fact=fact, value=value, top1=top1, loss=loss, accuracy=accuracy))
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.md").write_text(as_markdown(rows))
            draw(rows, options.out / "facts.svg")
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
