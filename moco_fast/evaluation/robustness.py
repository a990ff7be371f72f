"""Measurement of robustness: a linear classifier of clean images, tested on corrupted and on attacked ones."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from moco_fast import distributed
from moco_fast.encoders.layers import layer_features, layer_shapes
from moco_fast.evaluation.attacks import Attack, attack
from moco_fast.evaluation.base import FigureCurve, Inputs, Measured, Outcome, Want
from moco_fast.evaluation.corrupted import CorruptedFolder, corrupt_batch
from moco_fast.evaluation.corrupting import Workers
from moco_fast.evaluation.corruptions import Corruption
from moco_fast.evaluation.features import Features
from moco_fast.evaluation.heads import Classifier
from moco_fast.evaluation.inputs import PerImage
from moco_fast.evaluation.linear import train_cached
from moco_fast.evaluation.strengths import ALEXNET, ALEXNET_CLEAN, COMMON, strengths_for
from pipelines.batch import Batch
from shards.ground.cpus import available_cpus

if TYPE_CHECKING:
    from moco_fast.evaluation.tasks.robustness import Robustness

__all__ = ["corruption_errors", "is_imagenet", "masking_notes", "measure", "relative_corruption_errors"]

_ROWS = 8192  # features that are classified at once
_VERSION = 1
"""Of corruptions and attacks: what an older one left in the cache is not used."""

Errors = Mapping[str, Mapping[int, float]]
"""Share of wrong answers by kind and severity."""


@dataclass(frozen=True)
class _Tested:
    """What is tested."""

    task: "Robustness"
    inputs: Inputs
    classifier: Classifier
    bar: "tqdm[Any]"

    def predict(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32 in 0..1 to logits (B, C), with gradient."""
        features = layer_features(self.inputs.encoder, 255 * pixels, (self.task.layer,))[self.task.layer]
        return self.classifier(features.float())

    def error(self, features: Features) -> float:
        """Return the share of features whose samples are classified wrongly."""
        parts = features.values.split(_ROWS)
        found = torch.cat([self.classifier(part.to(self.inputs.device)).argmax(dim=1).cpu() for part in parts])
        return (found != features.labels).double().mean().item()


def measure(task: "Robustness", inputs: Inputs) -> Outcome:
    """Train the classifier and test it on everything; collective, every rank gets the outcome."""
    classifier, chosen, num_train = _fit(task, inputs)
    bar = tqdm(
        total=len(task.corruptions) * len(task.severities) + len(task.perturbations()),
        desc="robustness",
        unit="pass",
        disable=inputs.world.rank > 0,
        delay=3,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    with bar:
        tested = _Tested(task, inputs, classifier.to(inputs.device), bar)
        parts = [_corrupted(tested)] if task.corruptions else []
        parts += [_attacked(tested)] if task.attacks else []
    return Outcome(
        figures={name: figure for part in parts for name, figure in part.figures.items()},
        curves={name: curve for part in parts for name, curve in part.curves.items()},
        chosen=chosen,
        facts={"num_train": num_train} | {name: count for part in parts for name, count in part.facts.items()},
        notes=tuple(note for part in parts for note in part.notes),
    )


def _fit(task: "Robustness", inputs: Inputs) -> tuple[Classifier, dict[str, Any], int]:
    """Train the classifier on the first rank: what others computed could differ in the last bit."""
    found = None
    if inputs.world.rank == 0:
        trained, chosen, num_train = train_cached(task.linear(), inputs)
        found = trained.classifier.to(torch.device("cpu")), {"lr": chosen["lr"]}, num_train
    distributed.leave_together()
    found = distributed.tell_all(found)
    assert found is not None
    return found


# Corruptions -----------------------------------------------------------------------------------------------------


def _corrupted(tested: _Tested) -> Outcome:
    task, inputs = tested.task, tested.inputs
    clean = inputs.features(Want(split="test", layer=task.layer, at_most=task.max_images))
    clean_error = tested.error(clean)
    errors, num_corrupted = _errors(tested)
    figures = {"clean_error": Measured(value=clean_error, num_trials=len(clean))}
    figures |= {f"error_{kind}": Measured(value=fmean(of_kind.values())) for kind, of_kind in errors.items()}
    common = {kind: of_kind for kind, of_kind in errors.items() if kind in COMMON} or errors
    by_severity = {severity: fmean(each[severity] for each in common.values()) for severity in sorted(task.severities)}
    figures["corruption_error"] = Measured(value=fmean(by_severity.values()))
    notes: tuple[str, ...] = ()
    if (mce := corruption_errors(errors)) is not None and is_imagenet(inputs.class_names("test")):
        relative = relative_corruption_errors(errors, clean_error=clean_error)
        assert relative is not None
        figures |= {"mce": Measured(value=mce), "relative_mce": Measured(value=relative)}
        if task.corrupted is None:
            notes = ("mCE is of images that were corrupted here, published figures of ImageNet-C's (--corrupted)",)
    return Outcome(
        figures=figures,
        curves=_error_curves(clean_error, by_severity, errors),
        facts={"num_clean": len(clean), "num_corrupted": num_corrupted},
        notes=notes,
    )


def _errors(tested: _Tested) -> tuple[Errors, int]:
    """Return the errors on all corruptions, and how many images of each there are."""
    task, inputs = tested.task, tested.inputs
    num_workers = inputs.data.num_threads or available_cpus(inputs.world.local_world_size)
    errors: dict[str, dict[int, float]] = {}
    num_images = 0
    with Workers(num_workers) as workers:
        for kind in dict.fromkeys(task.corruptions):
            for severity in dict.fromkeys(task.severities):
                features = inputs.per_image(_corruption_pass(task, inputs, kind, severity, workers))
                errors.setdefault(kind, {})[severity] = tested.error(features)
                num_images = len(features)
                tested.bar.update()
    return errors, num_images


def _corruption_pass(task: "Robustness", inputs: Inputs, kind: str, severity: int, workers: Workers) -> PerImage:
    """Return how the features of images with a corruption are made."""
    [dim] = layer_shapes(inputs.encoder, (task.layer,), size=inputs.size)[task.layer]

    def features_of(images: Tensor) -> Tensor:
        with inputs.autocast():
            return layer_features(inputs.encoder, images, (task.layer,))[task.layer]

    title = f"{kind} {severity}"
    if task.corrupted is not None:
        folder = CorruptedFolder(path=Path(task.corrupted), class_names=inputs.class_names("test"))
        return PerImage(
            name=f"{task.layer}-read{_VERSION}",
            title=title,
            dim=dim,
            function=lambda batch: features_of(batch.views[0]),
            images=folder.images(kind, severity, workers),
            at_most=task.max_images,
        )
    strengths, seed = task.strengths or strengths_for(inputs.size), task.corruption_seed or 0
    corruption = Corruption(kind=kind, severity=severity, strengths=strengths, seed=seed)
    return PerImage(
        name=f"{task.layer}-{kind}-{severity}-{strengths}-seed{seed}-made{_VERSION}",
        title=title,
        dim=dim,
        function=lambda batch: features_of(corrupt_batch(corruption, batch, workers)),
        at_most=task.max_images,
    )


def corruption_errors(errors: Errors) -> float | None:
    """Return mCE: errors as shares of AlexNet's (Hendrycks & Dietterich 2019, section 4.2); None: some are missing.

    Averages over the severities of a kind are divided, not the errors one by one.
    """
    return _beside_alexnet(errors, clean=0.0, clean_of_alexnet=0.0)


def relative_corruption_errors(errors: Errors, *, clean_error: float) -> float | None:
    """Return the relative mCE: the same of what corruptions add to the error on clean images, AlexNet's likewise.

    Source: Hendrycks & Dietterich 2019, section 4.2.
    """
    return _beside_alexnet(errors, clean=clean_error, clean_of_alexnet=ALEXNET_CLEAN)


def _beside_alexnet(errors: Errors, *, clean: float, clean_of_alexnet: float) -> float | None:
    if not all(set(errors.get(kind, {})) == {1, 2, 3, 4, 5} for kind in COMMON):
        return None
    return fmean((fmean(errors[kind].values()) - clean) / (ALEXNET[kind] - clean_of_alexnet) for kind in COMMON)


def is_imagenet(class_names: tuple[str, ...]) -> bool:
    """Return whether classes are the thousand of ImageNet, by their WordNet ids."""
    return len(class_names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names)


def _error_curves(clean: float, by_severity: Mapping[int, float], errors: Errors) -> dict[str, FigureCurve]:
    def curve(title: str, caption: str, of: Mapping[int, float], *, in_report: bool) -> FigureCurve:
        points = ((0.0, clean), *((float(severity), of[severity]) for severity in sorted(of)))
        return FigureCurve(title=title, caption=caption, over="severity", points=points, in_report=in_report)

    caption = "Share of corrupted images that are classified wrongly, mean over the kinds; severity 0 is clean images."
    curves = {"corruption_error": curve("Error on corrupted images", caption, by_severity, in_report=True)}
    for kind, of_kind in errors.items():
        caption = "Share of images that are classified wrongly; severity 0 is clean images."
        curves[f"error_{kind}"] = curve(f"Error: {kind.replace('_', ' ')}", caption, of_kind, in_report=False)
    return curves


# Attacks ---------------------------------------------------------------------------------------------------------


def _attacked(tested: _Tested) -> Outcome:
    task = tested.task
    clean = tested.inputs.per_image(_attack_pass(tested, "no attack", None))
    accuracies: dict[tuple[str, str], dict[float, float]] = {}
    num_images, without = len(clean), _accuracy(clean)
    figures = {"attacked_0": Measured(value=without, num_trials=num_images)}
    for name, norm, eps in task.perturbations():
        steps = task.steps if name == "pgd" else 1
        radius = eps / 255 if norm == "linf" else eps
        how = Attack(
            norm=norm,
            eps=radius,
            steps=steps,
            step_size=radius * task.step_size if name == "pgd" and task.step_size else None,
            random_start=name == "pgd" and task.random_start,
            seed=tested.inputs.seed,
        )
        accuracy = _accuracy(tested.inputs.per_image(_attack_pass(tested, f"{name} {norm} {eps:g}", how)))
        figures[f"{name}_{norm}_{eps:g}"] = Measured(value=accuracy, num_trials=num_images)
        accuracies.setdefault((name, norm), {0.0: without})[eps] = accuracy
        tested.bar.update()
    curves = {f"{name}_{norm}": _accuracy_curve(name, norm, of) for (name, norm), of in accuracies.items()}
    notes = masking_notes(accuracies, num_images=num_images)
    return Outcome(figures=figures, curves=curves, facts={"num_attacked": num_images}, notes=notes)


def _attack_pass(tested: _Tested, title: str, how: Attack | None) -> PerImage:
    """Return how the answers for images under an attack are found; None: for images as they are.

    They are computed in float32: in half precision gradients are so coarse that an attack finds less than there is.
    """

    def answers(batch: Batch) -> Tensor:
        pixels = batch.views[0].float() / 255
        if how is not None:
            labels = batch.label.clamp(min=0).to(pixels.device)
            pixels = attack(tested.predict, pixels, labels, how, index=batch.index)
        return tested.predict(pixels).argmax(dim=1, keepdim=True)

    settings = "clean" if how is None else "-".join(str(value) for value in vars(how).values())
    return PerImage(
        name=f"answer-{tested.task.layer}-{tested.classifier.digest[:16]}-{settings}-made{_VERSION}",
        title=title,
        dim=1,
        function=answers,
        at_most=tested.task.max_attacked,
    )


def _accuracy(answers: Features) -> float:
    return (answers.values[:, 0].cpu() == answers.labels).double().mean().item()


def _accuracy_curve(name: str, norm: str, accuracies: Mapping[float, float]) -> FigureCurve:
    over = "eps in 255ths" if norm == "linf" else "eps"
    return FigureCurve(
        title=f"Accuracy under {name.upper()}, {norm.capitalize()}",
        caption=f"Share of attacked images that are still classified rightly, over {over}.",
        over=over,
        points=tuple(sorted(accuracies.items())),
    )


def masking_notes(accuracies: Mapping[tuple[str, str], Mapping[float, float]], *, num_images: int) -> tuple[str, ...]:
    """Return signs that gradients mislead attacks, so that accuracies are too high (Athalye et al. 2018, section 3.1).

    Those are accuracy that rises with eps, or that is higher after several steps than after one: by more than two
    standard errors.

    Args:
        accuracies: by attack and norm, then by eps.
        num_images: on which they were measured.
    """

    def is_higher(one: float, other: float) -> bool:
        return one - other > 2 * sqrt(max(other * (1 - other), 1 / num_images) / num_images)

    hint = "gradients may be masked, and the encoder less robust than its figures"
    notes: list[str] = []
    for (name, norm), of in accuracies.items():
        by_eps = sorted(of.items())
        for (near, before), (far, after) in pairwise(by_eps):
            if is_higher(after, before):
                notes.append(f"accuracy under {name} {norm} rises from eps {near:g} to {far:g}: {hint}")
        if name == "pgd":
            worse = [eps for eps, value in by_eps if is_higher(value, accuracies.get(("fgsm", norm), {}).get(eps, 1.0))]
            notes += [f"pgd {norm} finds less than fgsm at eps {eps:g}: {hint}" for eps in worse]
    return tuple(notes)
