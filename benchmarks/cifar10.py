"""CIFAR-10 on a CPU: our MoCo against lightly's, and torchvision's color operations against our linear map.

    python benchmarks/cifar10.py --data cifar10-jpeg.tar.xz --out build/cifar10 --json build/cifar10.json

`ours` is the recipe `cifar10`, whose colors are those of MoCo v2; `v1's colors` gives it the jitter of MoCo v1 with its
strong hue, after the grayscale. `linear` is `--views.color linear`. `lightly` is put together from its parts as in
its MoCo example: MoCoV2Transform, NTXentLoss with a memory bank, update_momentum. All have the same images, initial
weights, optimizer, schedule, batch and number of steps, and are judged by the same kNN. Ours has virtual BN groups, as
the recipe says; on one process lightly has nothing in their place.

Trainings are kept one by one under --out: interrupted, the same command goes on where it was. `--parts accuracy`
trains, `--parts speed` times loader, step and both together, in alternating rounds on an otherwise idle machine.
Without benchmarks/requirements.txt, lightly and the speeds beside it are left out. Writes cifar10.md.
"""

import argparse
import copy
import importlib.util
import json
import shlex
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from importlib import metadata
from itertools import count, islice
from pathlib import Path, PurePosixPath
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from alternating import Claim, claims_table, compare, header, write_claims
from torch import Tensor, nn

from moco_fast.commandline import parse
from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder, build_encoder
from moco_fast.evaluation.registry import open_evaluation
from moco_fast.report.record import read_run
from moco_fast.training.build import build, open_run_loader, open_sets
from moco_fast.training.loop import train
from moco_fast.training.runtime import Runtime, start
from moco_fast.training.schedule import lr_at
from pipelines.batch import Batch
from pipelines.config import VIEWS
from pipelines.world import World
from shards.cli import main as make_shards

OURS, LINEAR, LIGHTLY = "ours", "ours, linear", "lightly"
V1, V1_LINEAR = "v1's colors", "v1's colors, linear"
CONTENDERS = (OURS, LINEAR, V1, V1_LINEAR, LIGHTLY)
PER_CLASS = {"train": 1000, "test": 200}
RECIPE = (
    "--model.encoder resnet18_quarter --data.batch-size 128 --bn.num-groups 4 --method.queue-size 1024 "
    "--run.device cpu --run.precision fp32 --eval.layer backbone --eval.k 20 --eval.every-steps 1000000 "
    "--checkpoint.every-steps 50 --checkpoint.keep 1 --log.every-steps 10 --log.trackers"
)


def prepare(data: Path, folder: Path) -> None:
    """Unpack the first images of each class and pack them into shards, once."""
    for split, per_class in PER_CLASS.items():
        images, shards = folder / "images" / split, folder / "shards" / split
        if (shards / "manifest.json").is_file():
            continue
        with tarfile.open(data) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isfile() and name.parts[1] == split and int(name.stem) < per_class:
                    path = images / name.parts[2] / name.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    path.write_bytes(content.read())
        assert make_shards(["pack", str(images), "--out", str(shards), "--mean-rgb"]) == 0


def color_options(contender: str) -> list[str]:
    """The options that set a contender's colors apart from those of the recipe."""
    words = ["--views.color", "linear"] if contender in (LINEAR, V1_LINEAR) else []
    if contender in (V1, V1_LINEAR):
        v1 = VIEWS["moco-v1"].query
        for view in ("query", "key"):
            words += [f"--views.{view}.hue", str(v1.hue), f"--views.{view}.jitter-p", str(v1.jitter_p)]
            words += [f"--views.{view}.grayscale-first" if v1.grayscale_first else f"--views.{view}.no-grayscale-first"]
    return words


def configure(contender: str, seed: int, options: argparse.Namespace) -> Config:
    """The whole recipe of one training."""
    folder = options.out
    words = ["cifar10", "--data.shards", f"{folder}/shards/train", "--eval.shards", f"{folder}/shards/test"]
    words += ["--run.out", f"{folder}/runs/{contender.replace(', ', '-').replace(' ', '-')}-seed-{seed}"]
    words += ["--run.seed", str(seed), "--run.steps", str(options.steps), "--data.num-threads", str(options.workers)]
    return parse([*words, *RECIPE.split(), *color_options(contender)])


class Lightly:
    """MoCo from lightly's parts, as in its example examples/pytorch/moco.py."""

    def __init__(self, config: Config):
        from lightly.loss import NTXentLoss
        from lightly.models.utils import deactivate_requires_grad

        self._config = config
        torch.manual_seed(config.run.seed)
        self.query: Encoder = build_encoder(config.model, config.method)
        # Its loader normalizes the images.
        self._network = nn.Sequential(self.query.backbone, self.query.head)
        self._key = copy.deepcopy(self._network)
        deactivate_requires_grad(self._key)
        bank_size = (config.method.queue_size, config.method.dim)
        self._criterion = NTXentLoss(temperature=config.method.temperature, memory_bank_size=bank_size)
        optim = config.optim
        self._optimizer = torch.optim.SGD(
            self.query.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )

    def batches(self) -> Iterable[tuple[list[Tensor], Tensor, list[str]]]:
        """Its loader: the same folder of files that our shards were packed from."""
        from lightly.data import LightlyDataset
        from lightly.transforms import MoCoV2Transform

        data, view = self._config.data, self._config.views.query
        images = Path(data.shards).parents[1] / "images" / "train"
        transform = MoCoV2Transform(
            input_size=self._config.views.size,
            min_scale=view.crop_scale[0],
            gaussian_blur=view.blur_p,
            normalize={"mean": list(self._config.model.mean), "std": list(self._config.model.std)},
        )
        return torch.utils.data.DataLoader(
            LightlyDataset(str(images), transform=transform),
            batch_size=data.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=data.num_threads or 0,
        )

    def step(self, views: list[Tensor], lr: float) -> None:
        """One step, in the order of the example."""
        from lightly.models.utils import update_momentum

        for group in self._optimizer.param_groups:
            group["lr"] = lr
        update_momentum(self._network, self._key, m=self._config.method.momentum)
        queries = self._network(views[0])
        with torch.no_grad():
            keys = self._key(views[1])
        loss = self._criterion(queries, keys)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def train_lightly(config: Config) -> Encoder:
    """A whole training."""
    moco, num_steps = Lightly(config), config.run.steps
    assert num_steps is not None
    for step, (views, _, _) in enumerate(islice(forever(moco.batches()), num_steps)):
        moco.step(views, lr_at(step, num_steps, config.optim))
    return moco.query


Item = TypeVar("Item")


def forever(loader: Iterable[Item]) -> Generator[Item]:
    """Epoch after epoch."""
    while True:
        yield from loader


def top1(encoder: Encoder, config: Config) -> float:
    """The share of held-out images that kNN classifies rightly, with the settings of our runs."""
    evaluation = open_evaluation(config, open_sets(config))
    assert evaluation is not None
    return evaluation.figures(encoder, device=torch.device("cpu"), world=World())["knn/top1"]


def measure_accuracy(contender: str, seed: int, options: argparse.Namespace) -> None:
    """Train once and keep what came of it, unless that was done before."""
    kept = options.out / "accuracy" / f"{contender} seed {seed}.json"
    if kept.is_file():
        return
    config = configure(contender, seed, options)
    if contender == LIGHTLY:
        accuracy = {"trained": top1(train_lightly(config), config)}
    else:
        if code := train(config):
            raise SystemExit(code)
        evaluations = read_run(config.run.out).evaluations
        accuracy = {"untrained": evaluations[0]["knn/top1"], "trained": evaluations[-1]["knn/top1"]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    row = {"contender": contender, "seed": seed, "steps": options.steps}
    kept.write_text(json.dumps(row | accuracy) + "\n")
    print(f"{contender}, seed {seed}: {accuracy}", flush=True)


def rate(step: Callable[[], object], batch_size: int, seconds: float) -> float:
    """Samples a second of `step`, called for at least so long."""
    started = time.perf_counter()
    for number in count(1):
        step()
        if (took := time.perf_counter() - started) >= seconds:
            return number * batch_size / took
    raise AssertionError


@contextmanager
def our_batches(config: Config, runtime: Runtime) -> Iterator[Iterator[Batch]]:
    """Our loader, which works only as long as it is measured."""
    with closing(open_run_loader(config, runtime)) as loader, closing(forever(loader)) as batches:
        yield batches


def measure_speed(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Samples/s of loader, step and both together, by contender, one number a round.

    A loader is open only while it is measured: what one prepares ahead of need must not take the other's time.
    """
    config = configure(OURS, 0, options)
    runtime = start(config.run)
    parts, theirs = build(config, runtime), Lightly(config)
    parts.loader.close()

    def our_step(batch: Batch) -> None:
        parts.train_step([batch], lr=config.optim.lr, scheduled=config.method.scheduled(0, 1))

    def their_step(batch: tuple[list[Tensor], Tensor, list[str]]) -> None:
        theirs.step(batch[0], config.optim.lr)

    contenders: dict[str, tuple[Callable[[], AbstractContextManager[Iterator[Any]]], Callable[[Any], None]]] = {
        OURS: (lambda: our_batches(config, runtime), our_step),
        LIGHTLY: (lambda: closing(forever(theirs.batches())), their_step),
    }
    speeds: dict[str, dict[str, list[float]]] = {what: {OURS: [], LIGHTLY: []} for what in ("loader", "step", "both")}
    for _ in range(options.rounds):
        for contender, (open_batches, step) in contenders.items():
            with open_batches() as batches:
                kept = next(batches)
                works: dict[str, Callable[[], object]] = {
                    "loader": lambda of=batches: next(of),
                    "both": lambda of=batches, step=step: step(next(of)),
                }
                for what, work in works.items():
                    speeds[what][contender].append(rate(work, config.data.batch_size, options.seconds))
            work = partial(step, kept)
            speeds["step"][contender].append(rate(work, config.data.batch_size, options.seconds))
    runtime.close()
    return speeds


def accuracy_table(rows: list[dict[str, Any]], seeds: list[int], contenders: list[str]) -> tuple[str, list[Claim]]:
    """Markdown and claims of the seeds with which every contender was trained."""
    of = {(row["contender"], row["seed"]): row for row in rows}
    done = [seed for seed in seeds if all((name, seed) in of for name in contenders)]
    lines = [f"| seed | untrained | {' | '.join(contenders)} |", "|---|---" + "|---" * len(contenders) + "|"]
    columns: dict[str, list[float]] = {
        "untrained": [of[contenders[0], seed].get("untrained", float("nan")) for seed in done],
        **{name: [of[name, seed]["trained"] for seed in done] for name in contenders},
    }
    for number, seed in enumerate(done):
        lines.append(f"| {seed} | {' | '.join(f'{values[number]:.1%}' for values in columns.values())} |")
    if len(done) < 2:
        return "\n".join(lines) + "\n", []
    lines.append(f"| mean | {' | '.join(f'{mean(values):.1%}' for values in columns.values())} |")
    lines.append(f"| standard deviation | {' | '.join(f'{stdev(values):.1%}' for values in columns.values())} |")
    claims: list[Claim] = []
    # A point below is as good: the goal as a ratio. What the color map costs is reported, and nothing promised.
    for name, other, may_lack in ((OURS, LIGHTLY, 0.01), (OURS, LINEAR, None), (V1, V1_LINEAR, None)):
        if not {name, other} <= set(contenders):
            continue
        ours, theirs = mean(columns[name]), mean(columns[other])
        apart = [a - b for a, b in zip(columns[name], columns[other], strict=True)]
        error = stdev(apart) / len(done) ** 0.5
        lines.append(f"\n{name} minus {other}: {100 * mean(apart):+.1f} points, standard error {100 * error:.1f}.")
        goal = None if may_lack is None else (theirs - may_lack) / theirs
        ratios = [a / b for a, b in zip(columns[name], columns[other], strict=True)]
        claim = Claim(
            claim=f"CIFAR-10: kNN top-1, mean of {len(done)} seeds: {name} / {other}",
            ours=ours,
            theirs=theirs,
            unit="of images",
            ratio=ours / theirs,
            lowest=min(ratios),
            highest=max(ratios),
            goal=goal,
            holds=None if goal is None else ours / theirs >= goal,
        )
        claims.append(claim)
    return "\n".join(lines) + "\n", claims


def report(options: argparse.Namespace) -> str:
    """Write what is known so far; returns the Markdown."""
    rows = [json.loads(path.read_text()) for path in sorted((options.out / "accuracy").glob("*.json"))]
    table, claims = accuracy_table(rows, options.seeds, options.only)
    if (kept := options.out / "speed.json").is_file():
        for what, rates in json.loads(kept.read_text()).items():
            claims.append(compare(f"CIFAR-10: {what}, against lightly", rates[OURS], rates[LIGHTLY], unit="samples/s"))
    command = shlex.join(["python", "benchmarks/cifar10.py", *sys.argv[1:]])
    lightly = f", lightly {metadata.version('lightly')}" if LIGHTLY in options.only else ""
    text = (
        f"# CIFAR-10: color modes, and ours against lightly\n\n{header()}{lightly}\n\n    {command}\n\n"
        f"ResNet-18's layout at a quarter of its channels, CIFAR stem; {10 * PER_CLASS['train']:,} images to train on, "
        f"{10 * PER_CLASS['test']:,} held out; {options.steps} steps of 128; kNN with k = 20.\n\n"
        f"{table}\n{claims_table(claims)}\n"
    )
    (options.out / "cifar10.md").write_text(text)
    write_claims(options.json, claims)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tar of cifar10/{train,test}/CLASS/NUMBER.jpg")
    parser.add_argument("--out", type=Path, default=Path("build/cifar10"))
    parser.add_argument("--json", type=Path, help="write the claims here")
    parser.add_argument("--parts", nargs="*", default=["accuracy", "speed"], help="what to measure; none: only pack")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2, help="of the training step")
    parser.add_argument("--workers", type=int, default=2, help="processes that make views")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timing")
    options = parser.parse_args()
    if LIGHTLY in options.only and not importlib.util.find_spec("lightly"):
        print("lightly and the speeds are left out; to have them: install benchmarks/requirements.txt")
        options.only = [name for name in options.only if name != LIGHTLY]
    torch.set_num_threads(options.threads)
    prepare(options.data, options.out)
    if "accuracy" in options.parts:
        for seed in options.seeds:
            for contender in options.only:
                measure_accuracy(contender, seed, options)
                report(options)
    if "speed" in options.parts and LIGHTLY in options.only:
        (options.out / "speed.json").write_text(json.dumps(measure_speed(options)) + "\n")
    print(report(options))


if __name__ == "__main__":
    main()
