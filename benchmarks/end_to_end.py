"""Training from shards to updated weights: ours against the authors' pipeline and step, in alternating rounds.

    python benchmarks/end_to_end.py [--photos FILE.tar | --shards DIR] [--encoder resnet18_quarter] [--size 224]

`ours` is a run of the recipe moco-v2: its loader and its step. `authors'` is what their code does: PIL and
torchvision's transforms in a DataLoader with a worker per CPU (loaders/pillow_authors.py), then their step (step.py),
on the same bytes. Both train the same encoder at the same batch, in this process, on the same cores. Beside it stands
the overlap that `moco-fast bench` finds: ours end to end over our step alone.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from alternating import Claim, alternate, bars, claims_table, compare, header, write_claims
from loaders.base import Options
from loaders.registry import open_contestant
from photographs import photograph_shards
from step import Authors, Setting

from moco_fast.bench.measure import measure
from moco_fast.bench.result import table
from moco_fast.config import BatchNormConfig, Config
from moco_fast.presets import PRESETS
from moco_fast.training.build import build
from moco_fast.training.runtime import start


def recipe(options: argparse.Namespace, shards: Path) -> Config:
    """MoCo v2 with the encoder and the views asked for; plain batch norm, as in the authors' step on one process."""
    base = PRESETS["moco-v2"][1]
    return replace(
        base,
        data=replace(base.data, shards=str(shards), batch_size=options.batch),
        views=replace(base.views, size=options.size),
        model=replace(base.model, encoder=options.encoder),
        method=replace(base.method, queue_size=options.queue),
        bn=BatchNormConfig(policy="none"),
        run=replace(base.run, device="cpu", precision="fp32"),
    )


@contextmanager
def open_ours(config: Config, steps: int) -> Iterator[Callable[[], None]]:
    """A round of a run of ours."""
    runtime = start(config.run)
    parts = build(config, runtime)
    batches = (batch for _ in iter(int, 1) for batch in parts.loader)

    def train() -> None:
        for _ in range(steps):
            parts.train_step([next(batches)], lr=config.optim.lr, scheduled=config.method.scheduled(0, 1))

    try:
        yield train
    finally:
        parts.loader.close()
        runtime.close()


@contextmanager
def open_authors(config: Config, steps: int) -> Iterator[Callable[[], None]]:
    """A round of theirs; their loader gives normalized floats, as their step takes them."""
    batch, size = config.data.batch_size, config.views.size
    batches, close = open_contestant("pil", Options(shards=config.data.shards, size=size, batch_size=batch))
    setting = Setting(
        encoder=config.model.encoder,
        batch=batch,
        size=size,
        queue=config.method.queue_size,
        device=torch.device("cpu"),
        precision="fp32",
        compile=False,
    )
    authors = Authors(setting, setting.views())

    def train() -> None:
        for _ in range(steps):
            authors.views = [view.contiguous(memory_format=torch.channels_last) for view in next(batches)]
            authors.step()

    try:
        yield train
    finally:
        close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", type=Path, help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--encoder", default="resnet18_quarter")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="in a round; more than a loader keeps ready")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the overlap; 0: leave it out")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--plot", type=Path, help="where to draw the rates")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = options.shards or photograph_shards(Path(folder), num=300, photos=options.photos)
        config = recipe(options, shards)
        with open_ours(config, options.steps) as ours, open_authors(config, options.steps) as authors:
            alternatives = {"ours": ours, "authors'": authors}
            seconds = alternate(alternatives, rounds=options.rounds, device=torch.device("cpu"))
        samples = options.steps * options.batch
        rates = {name: [samples / each for each in values] for name, values in seconds.items()}
        what = f"{options.encoder} at {options.size} px, batch {options.batch}"
        unit = "samples/s"
        claims: list[Claim] = [
            compare(f"training end to end, {what} / authors' code", rates["ours"], rates["authors'"], unit=unit)
        ]
        print(f"{header()}; {what}, {options.rounds} rounds of {options.steps} steps\n")
        if options.seconds:
            result = measure(config, seconds=options.seconds)
            assert result.end_to_end is not None
            assert result.step is not None
            both = [result.end_to_end.median], [result.step.median]
            claims.append(compare(f"overlap, {what}: end to end / our step alone", *both, unit=unit))
            print(f"```\n{table(result)}\n```\n")
    print(claims_table(claims))
    write_claims(options.json, claims)
    bars(options.plot, {f"Training end to end: {what}": rates}, unit=unit)


if __name__ == "__main__":
    main()
