"""Three facts of the paper on a small problem with real images.

    python benchmarks/cifar10.py --data cifar10-jpeg.tar.xz --out build/cifar10 --parts   # only packs the images
    python benchmarks/facts.py --train build/cifar10/shards/train --val build/cifar10/shards/test --out build/facts

With m = 0 learning fails; a larger dictionary helps, as long as its keys are consistent; without shuffling BN the
contrastive task gets easier but learning does not follow. Every row is a whole run of one small recipe with one option
changed. Without shuffling, batch statistics are those of the same small groups, and only the key images stay where they
are. results/facts.md says how far each of them shows at this size.

Interrupted, the same command goes on where it was. Writes facts.md and facts.svg: kNN top-1, the loss and the accuracy
of the contrastive task at the end of the run, means over seeds.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from unittest import mock

import matplotlib as mpl
import torch
from alternating import Claim, claims_table, compare, header, write_claims
from torch import Tensor

from moco_fast.commandline import parse
from moco_fast.methods.shuffle import VirtualGroups
from moco_fast.report.record import RunRecord, read_run
from moco_fast.training.loop import train

MOMENTUM, SIZE, BATCH_NORM = "momentum m, K = 4,096", "dictionary size K", "BN in groups of 8, K = 512"
SHUFFLED, NOT_SHUFFLED = "shuffled", "not shuffled"
_GROUPS_OF_8 = ["--bn.num-groups 8", "--method.queue-size 512"]
FACTS: dict[str, dict[str, list[str]]] = {
    MOMENTUM: {m: [f"--method.momentum {m}", "--method.queue-size 4096"] for m in ("0.0", "0.9", "0.99", "0.999")},
    SIZE: {k: [f"--method.queue-size {k}"] for k in ("1", "16", "256", "4096")},
    BATCH_NORM: {SHUFFLED: _GROUPS_OF_8, NOT_SHUFFLED: _GROUPS_OF_8},
}
TIMES_LONGER = {MOMENTUM: 1, SIZE: 4, BATCH_NORM: 4}
"""Times --steps. A larger dictionary is a harder task, and an encoder has to learn to cheat, too."""
BATCH_SIZE = 64
RECIPE = (
    f"--model.encoder resnet18_quarter --model.stem imagenet --method.head mlp --data.batch-size {BATCH_SIZE} "
    "--bn.num-groups 2 --method.queue-size 256 --method.momentum 0.99 --optim.lr 0.03 --run.device cpu "
    "--run.precision fp32 --eval.layer backbone --eval.k 20 --checkpoint.every-steps 500 --checkpoint.keep 1 "
    "--log.every-steps 10 --log.trackers"
)
"""Small enough for some minutes on a core: the stem leaves 8 x 8 of a view of 32 x 32."""
CHANCE = 0.1
NUM_LAST_LINES = 5
"""Lines of metrics at the end of a run over which loss and accuracy are averaged."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of one option, a number a seed."""

    fact: str
    value: str
    untrained_top1: list[float]
    top1: list[float]
    loss: list[float]
    accuracy: list[float]
    loss_by_step: list[tuple[float, float]]
    """Along the first seed's run."""
    top1_by_step: list[tuple[float, float]]


@contextmanager
def without_shuffling() -> Iterator[None]:
    """Keep the groups' own statistics, but compute each key among its query's neighbors."""

    def as_they_are(_: VirtualGroups, rows: Tensor) -> Tensor:
        return rows

    with mock.patch.multiple(VirtualGroups, shuffle=as_they_are, unshuffle=as_they_are):
        yield


def run(words: list[str], steps: int, seed: int, options: argparse.Namespace, *, shuffled: bool) -> RunRecord:
    """Train, unless that is done, and read the run's folder. Equal runs share one."""
    changes = "".join(words).replace("--", "-").replace(".", "-")
    out = options.out / "runs" / f"run{changes}{'' if shuffled else '-not-shuffled'}-{steps}-steps-seed-{seed}"
    recipe = ["cifar10", "--data.shards", str(options.train), "--eval.shards", str(options.val), *RECIPE.split()]
    recipe += ["--data.num-threads", str(options.workers), "--run.steps", str(steps)]
    recipe += ["--eval.every-steps", str(options.steps // 2)]
    config = parse([*recipe, "--run.out", str(out), "--run.seed", str(seed), *words])
    if not (out / "outcome.json").is_file() or read_run(out).status != "finished":
        if shuffled:
            code = train(config)
        else:
            with without_shuffling():
                code = train(config)
        if code:
            raise SystemExit(code)
    return read_run(out)


def measure(fact: str, value: str, seeds: list[int], options: argparse.Namespace) -> Row:
    """All seeds of one value; an option that the recipe has already is left to it."""
    words = [word for option in FACTS[fact][value] if f"{option} " not in RECIPE for word in option.split()]
    steps = options.steps * TIMES_LONGER[fact]
    records = [run(words, steps, seed, options, shuffled=value != NOT_SHUFFLED) for seed in seeds]
    ends = [record.training[-NUM_LAST_LINES:] for record in records]
    return Row(
        fact=fact,
        value=value,
        untrained_top1=[record.evaluations[0]["knn/top1"] for record in records],
        top1=[record.evaluations[-1]["knn/top1"] for record in records],
        loss=[mean(line["loss"] for line in lines) for lines in ends],
        accuracy=[mean(line["accuracy"] for line in lines) for lines in ends],
        loss_by_step=[(line["step"], line["loss"]) for line in records[0].training],
        top1_by_step=[(line["step"], line["knn/top1"]) for line in records[0].evaluations],
    )


def judge(rows: list[Row]) -> list[Claim]:
    """The three facts as ratios, seed by seed; a fact shows when its median is above 1."""
    of = {(row.fact, row.value): row for row in rows}
    shuffled, leaking = of[BATCH_NORM, SHUFFLED], of[BATCH_NORM, NOT_SHUFFLED]
    compared = {
        "kNN top-1 with m = 0.99 instead of 0": (of[MOMENTUM, "0.99"].top1, of[MOMENTUM, "0.0"].top1),
        "kNN top-1 with K = 16 instead of 1": (of[SIZE, "16"].top1, of[SIZE, "1"].top1),
        "kNN top-1 with K = 256 instead of 16": (of[SIZE, "256"].top1, of[SIZE, "16"].top1),
        "kNN top-1 with shuffling BN instead of without": (shuffled.top1, leaking.top1),
    }
    claims = [compare(text, one, other, unit="of images", goal=1.0) for text, (one, other) in compared.items()]
    text = "loss without shuffling BN instead of with it"
    return [*claims, compare(text, leaking.loss, shuffled.loss, unit="nats", less_is_better=True, goal=1.0)]


def as_markdown(rows: list[Row], claims: list[Claim], num_seeds: int, steps: int) -> str:
    """Write the table."""
    command = shlex.join(["python", "benchmarks/facts.py", *sys.argv[1:]])
    text = (
        f"# Facts of the paper on CIFAR-10\n\n{header()}\n\n    {command}\n\n"
        f"ResNet-18's layout at a quarter of its channels, {steps:,} steps of {BATCH_SIZE} "
        f"({steps * TIMES_LONGER[SIZE]:,} for K and batch norm), means over {num_seeds} seeds; loss and accuracy of "
        f"the contrastive task over the last {10 * NUM_LAST_LINES} steps. Losses of different K do not compare. "
        f"Untrained, kNN gets {mean(rows[0].untrained_top1):.1%}.\n\n"
        "| | | kNN top-1 | spread | loss | contrastive accuracy |\n|---|---|---|---|---|---|\n"
    )
    for row in rows:
        numbers = f"{mean(row.top1):.1%} | {pstdev(row.top1):.1%} | {mean(row.loss):.3f} | {mean(row.accuracy):.1%}"
        text += f"| {row.fact} | {row.value} | {numbers} |\n"
    return f"{text}\n{claims_table(claims)}\n"


def draw(rows: list[Row], path: Path) -> None:
    """Momentum and size: bars of kNN top-1 from chance upwards; batch norm: loss and kNN top-1 along a run."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for fact, axes in zip((MOMENTUM, SIZE), panels, strict=False):
        shown = [row for row in rows if row.fact == fact]
        heights, spreads = [mean(row.top1) for row in shown], [pstdev(row.top1) for row in shown]
        axes.bar([row.value for row in shown], heights, yerr=spreads, color="#4878a8")
        axes.axhline(mean(shown[0].untrained_top1), color="gray", linestyle="--", label="untrained")
        axes.set(title=fact, ylabel="kNN top-1", ylim=(CHANCE, None))
        axes.legend()
    for row in rows:
        if row.fact == BATCH_NORM:
            panels[2].plot(*zip(*row.loss_by_step, strict=True), label=row.value, linewidth=0.8)
            panels[3].plot(*zip(*row.top1_by_step, strict=True), label=row.value, marker=".")
    for axes, what in zip(panels[2:], ("contrastive loss", "kNN top-1"), strict=True):
        axes.set(title=BATCH_NORM, xlabel="step", ylabel=what)
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of training shards")
    parser.add_argument("--val", type=Path, required=True, help="folder of held-out shards")
    parser.add_argument("--out", type=Path, default=Path("build/facts"))
    parser.add_argument("--json", type=Path, help="write the claims here")
    parser.add_argument("--steps", type=int, default=2000, help="of the shorter runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2, help="of the training step")
    parser.add_argument("--workers", type=int, default=2, help="processes that make views")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    text = ""
    # Seed after seed: what is there early is a whole table of fewer seeds.
    for number in range(1, len(options.seeds) + 1):
        seeds = options.seeds[:number]
        rows = [measure(fact, value, seeds, options) for fact, values in FACTS.items() for value in values]
        claims = judge(rows)
        text = as_markdown(rows, claims, number, options.steps)
        (options.out / "facts.md").write_text(text)
        draw(rows, options.out / "facts.svg")
        write_claims(options.json, claims)
    print(text)


if __name__ == "__main__":
    main()
