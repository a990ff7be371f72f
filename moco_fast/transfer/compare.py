"""Comparison of initial weights: a network trained from each of them, with every seed, as results and tables."""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco_fast import distributed
from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder, build_backbone, width_of
from moco_fast.encoders.formats.base import digest_of, without_head
from moco_fast.encoders.formats.torchvision import RESNETS
from moco_fast.encoders.open import open_encoder
from moco_fast.evaluation.base import FigureCurve, FigureInfo, Measured, Outcome
from moco_fast.evaluation.classifier import randomize
from moco_fast.evaluation.result import Figure, Result, aligned, as_text, average_curves, summarize
from moco_fast.transfer.presets import TransferPreset
from moco_fast.transfer.training import Machine, NetworkTrainings, Start, Trained
from moco_fast.transfer.written import class_rows, write_beside
from moco_fast.versions import versions_of

__all__ = ["Comparison", "as_tables", "compare", "difference", "open_inits", "say_notes"]


@dataclass(frozen=True, kw_only=True)
class Init:
    """What networks begin with."""

    name: str
    """For people."""
    encoder: Encoder
    model: ModelConfig | None = None
    """What its backbone is built of; None: only another library builds it."""
    step: int | None = None
    """Optimizer steps that a run of ours had done."""
    is_random: bool = False
    """Whether every seed draws its weights."""

    def start(self, seed: int) -> Start:
        """Return the weights for a seed."""
        if self.is_random:
            randomize(self.encoder.backbone, seed=seed)
        name = self.name.partition(" (")[0]
        return Start(name=name, encoder=self.encoder, digest=digest_of(self.encoder), model=self.model)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What is to be compared."""

    task: str
    """As results call it."""
    preset_name: str
    preset: TransferPreset
    trainings: NetworkTrainings
    """Not begun yet."""
    inits: Sequence[Init]
    num_seeds: int
    out: Path
    """Folder for everything that is written."""
    notes: tuple[str, ...] = ()
    """On the sets."""


def open_inits(names: Sequence[str], *, network: str | None) -> list[Init]:
    """Open initial weights.

    Args:
        names: `random`, `supervised` or whatever `open_encoder` opens.
        network: whose random or supervised weights these are where no encoder is named beside them; otherwise they are
            of the first encoder's network. None: a ResNet-50.

    Raises:
        ValueError: the network is not the encoder's, an encoder cannot be opened, or there are no supervised weights of
            the network.
    """
    opened = {name: open_encoder(name) for name in names if name not in ("random", "supervised")}
    first = next(iter(opened.values()), None)
    own = None if first is None or first.model is None else first.model.encoder
    if first is not None and own is not None and network not in (None, own):
        raise ValueError(f"--network {network}, but {first.name} is a {own}, and all are compared in it: leave it out")
    network = own or network or "resnet50"
    inits: list[Init] = []
    for name in names:
        if name == "random":
            encoder = _plain(network) if first is None else _headless(first.encoder)
            model = ModelConfig(encoder=network) if first is None else first.model
            inits.append(Init(name=f"random ({network})", encoder=encoder, model=model, is_random=True))
        elif name == "supervised":
            if network not in RESNETS:
                raise ValueError(
                    f"--init supervised: torchvision has no weights of {network}; name a file or timm:NAME instead"
                )
            # Trained by the recipe of the paper's time: later weights are of longer training with more augmentation.
            supervised = open_encoder(f"torchvision:{network}.IMAGENET1K_V1")
            encoder = _headless(supervised.encoder)
            inits.append(Init(name=f"supervised ({supervised.name})", encoder=encoder, model=supervised.model))
        else:
            found = opened[name]
            encoder = _headless(found.encoder)
            inits.append(Init(name=found.name, encoder=encoder, model=found.model, step=found.step))
    return inits


def _plain(network: str) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(network)
    return without_head(backbone, width_of(backbone))


def _headless(encoder: Encoder) -> Encoder:
    """Return a copy without projection and prediction, for which a detector has no use."""
    encoder = copy.deepcopy(encoder)
    encoder.head, encoder.predictor = nn.Identity(), None
    return encoder


def compare(comparison: Comparison, machine: Machine) -> list[Result]:
    """Train and test a network from every init with every seed; collective.

    The results so far are written after each init, in place of earlier ones of the preset and beside those of others.
    See `NetworkTrainings.run` for what is raised.

    Returns:
        a result for each init, in their order, on every rank.
    """
    results: list[Result] = []
    by_class: list[dict[str, Any]] = []
    with comparison.trainings as trainings:
        for init in comparison.inits:
            begin = time.perf_counter()
            trained: list[Trained] = []
            for seed in range(comparison.num_seeds):
                trained.append(trainings.run(init.start(seed), seed=seed))
                by_class += class_rows(comparison.preset_name, init.name, seed, trained[-1])
            result = _result(comparison, machine, init, trained)
            results.append(replace(result, time_s=round(time.perf_counter() - begin, 3)))
            with distributed.leaving_together():
                if machine.world.rank == 0:
                    write_beside(comparison.out, results, by_class)
    return results


def _result(comparison: Comparison, machine: Machine, init: Init, trained: Sequence[Trained]) -> Result:
    trainings = comparison.trainings
    in_test = "nothing is found in them" if comparison.task == "detect" else "their pixels do not count"
    damaged = {
        "images of the training set cannot be decoded and were replaced": max(each.num_damaged for each in trained),
        f"images of the test set cannot be decoded: {in_test}": max(each.num_untested for each in trained),
    }
    return Result(
        task=comparison.task,
        protocol=comparison.preset_name,
        settings=asdict(comparison.preset),
        encoder={"name": init.name, "digest": digest_of(init.encoder)},
        step=init.step,
        data={
            split: {
                "where": each.where,
                "digest": each.identity,
                "num_samples": len(each),
                "num_classes": len(each.class_names),
            }
            for split, each in (("train", trainings.train_set), ("test", trainings.test_set))
        },
        view={},
        precision=machine.precision,
        device=str(machine.device),
        world_size=machine.world.world_size,
        seeds=tuple(range(comparison.num_seeds)),
        figures=summarize(trainings.infos(), [_outcome(each) for each in trained]),
        curves=average_curves([_outcome(each) for each in trained]),
        notes=(*comparison.notes, *(f"{number} {what}" for what, number in damaged.items() if number)),
        versions=versions_of("torch", "torchvision"),
    )


def _outcome(trained: Trained) -> Outcome:
    curve = FigureCurve(
        title="training loss",
        caption="Sum of the network's losses, mean since the point before.",
        over="step",
        points=tuple((float(step), loss) for step, loss in trained.curve),
        unit="number",
    )
    figures = {name: Measured(value=value) for name, value in trained.figures.items()}
    return Outcome(figures=figures, curves={"loss": curve})


def as_tables(results: Sequence[Result]) -> str:
    """Return the figures of each init, and how the others differ from the first, seed by seed."""
    if len(results) == 1:
        return as_text(results)
    first, *others = results
    lines = [[f"difference from {_short(first)}", *map(_short, others)]]
    for name, figure in first.figures.items():
        lines.append([figure.title, *(difference(figure, other.figures[name]) for other in others)])
    return f"{as_text(results)}\n\n{aligned(lines)}"


def _short(result: Result) -> str:
    return result.encoder["name"].partition(" (")[0]


def difference(first: Figure, other: Figure) -> str:
    """Return the mean difference in points, with its 95% interval over seeds."""
    pairs = zip(first.by_seed, other.by_seed, strict=True)
    outcomes = [Outcome(figures={"": Measured(value=theirs - ours)}) for ours, theirs in pairs]
    figure = summarize({"": FigureInfo(title="", caption="")}, outcomes)[""]
    spread = ""
    if figure.interval is not None:
        low, high = (100 * bound for bound in figure.interval)
        spread = f" ({low:+.2f} to {high:+.2f})"
    return f"{100 * figure.value:+.2f}{spread}"


def say_notes(results: Sequence[Result]) -> None:
    """Print what is to be noted of results."""
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"note: {note}", file=sys.stderr)
