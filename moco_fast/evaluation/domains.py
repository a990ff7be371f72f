"""Heads that are trained on one set and tested on others that have some of its classes."""

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moco_fast.evaluation.base import Inputs, Measured, Outcome, Split, Want
from moco_fast.evaluation.linear import train_cached
from moco_fast.evaluation.regression import fit_chosen
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.tasks.logistic import Logistic
from shards.ground.units import counted

if TYPE_CHECKING:
    from moco_fast.evaluation.tasks.domains import Domains

__all__ = ["measure", "numbers_of"]

Classifier = Callable[[Tensor, Tensor], Tensor]
"""Features (N, D) and (R,) classes that compete -> (N,) predictions among these; classes on the host."""


def measure(task: "Domains", inputs: Inputs) -> Outcome:
    """Train a head, and test it on the test set and on each domain, whose classes alone compete there."""
    classify, chosen = (_linear if task.head == "linear" else _logistic)(task, inputs)
    test = inputs.features(Want(split="test", layer=task.layer))
    in_domain = classify(test.values, torch.arange(inputs.num_classes)) == test.labels
    figures = {"in_domain": _share(in_domain)}
    facts = {"num_test": len(test)}
    notes: list[str] = []
    for name in task.more_sets():
        found = inputs.features(Want(split=name, layer=task.layer))
        labels = numbers_of(inputs, name)[found.labels]
        known = labels >= 0
        if not bool(known.all()):
            left_out = counted(int((~known).sum()), "sample")
            notes.append(f"left out: {left_out} of {name}, of classes that the training set lacks")
        if not bool(known.any()):
            raise ValueError(f"no sample of {name} has a class of the training set, so there is nothing to test")
        among = labels[known].unique()
        hits = classify(found.values, among)[known] == labels[known]
        figures[f"top1_{name}"] = _share(hits)
        facts[f"num_{name}"] = len(hits)
        same = torch.isin(test.labels, among)
        if len(among) < inputs.num_classes and bool(same.any()):
            figures[f"in_domain_{name}"] = _share(classify(test.values, among)[same] == test.labels[same])
    mean = fmean(figures[f"top1_{name}"].value for name in task.more_sets())
    return Outcome(figures={"mean": Measured(value=mean), **figures}, chosen=chosen, facts=facts, notes=tuple(notes))


def numbers_of(inputs: Inputs, split: Split) -> Tensor:
    """Return the training set's number of each class of a set, by its name: (C,) int64, -1 where it has none."""
    numbers = {name: number for number, name in enumerate(inputs.class_names("train"))}
    return torch.tensor([numbers.get(name, -1) for name in inputs.class_names(split)])


def _share(hits: Tensor) -> Measured:
    return Measured(value=hits.double().mean().item(), num_trials=len(hits))


def _linear(task: "Domains", inputs: Inputs) -> tuple[Classifier, dict[str, Any]]:
    linear = Linear(layer=(task.layer,), epochs=task.epochs).settled(None)
    trained, chosen, _ = train_cached(linear, inputs)
    return lambda values, among: trained.ranked(values, top=1, among=among)[:, 0, 0], {"lr": chosen["lr"]}


def _logistic(task: "Domains", inputs: Inputs) -> tuple[Classifier, dict[str, Any]]:
    train = inputs.features(Want(split="train", layer=task.layer))
    defaults = Logistic()
    fit, c = fit_chosen(
        train.values,
        train.labels,
        num_classes=inputs.num_classes,
        num_c=task.num_c,
        max_iter=defaults.max_iter,
        share=defaults.share,
        seed=inputs.seed,
        device=inputs.device,
    )
    return fit.predict, {"c": c}
