"""Learning from training labels of which a share is wrong."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moco_fast import distributed
from moco_fast.evaluation.base import FigureCurve, Inputs, Measured, Outcome, Want
from moco_fast.evaluation.draws import all_labels, asymmetric_targets, flip_labels
from moco_fast.evaluation.features import Features, near
from moco_fast.evaluation.heads import LinearHeads, Scaler, cosine, permuted_batches
from moco_fast.evaluation.labels import choice_split
from moco_fast.evaluation.tasks.label_noise import WAYS
from moco_fast.evaluation.training import Training, Trainings

if TYPE_CHECKING:
    from moco_fast.evaluation.tasks.label_noise import LabelNoise, Noise

__all__ = ["measure_label_noise"]

_ROWS = 8192  # features that are classified at once


def measure_label_noise(task: "LabelNoise", inputs: Inputs) -> Outcome:
    """Measure `label-noise`; collective. The test set's labels stay as they are."""
    noisy = {noise: _noisy_labels(noise, inputs) for noise in task.noises}
    right = all_labels(inputs.set_of("train"))
    trainings = [
        (f"{way}_{noise.name}", _training(task, inputs, way, noise, labels))
        for noise, labels in noisy.items()
        for way in task.ways
        if way != "linear"
    ]
    curves: dict[str, Sequence[float]] = {}
    chosen: dict[str, float] = {}
    if "linear" in task.ways:
        for noise, (curve, rate) in _learn_all_linear(task, inputs, noisy).items():
            curves[f"linear_{noise.name}"], chosen[f"linear_lr_{noise.name}"] = curve, rate
    has_diverged = False
    num_steps = sum(training.num_steps for _, training in trainings)
    with Trainings(inputs, num_steps=num_steps) as run:
        for name, training in trainings:
            tested = run.run(training)
            curves[name] = tested.curve
            has_diverged = has_diverged or tested.has_diverged
    num_test = int((all_labels(inputs.set_of("test")) >= 0).sum())
    figures = {name: Measured(value=curve[-1], num_trials=num_test) for name, curve in curves.items()}
    figures |= {f"{name}_best": Measured(value=max(curve)) for name, curve in curves.items()}
    wrong = {f"num_wrong_{noise.name}": int((labels != right).sum()) for noise, labels in noisy.items()}
    return Outcome(
        figures=figures,
        curves=_over_noise(task, figures),
        chosen=chosen,
        facts={"num_train": int((right >= 0).sum()), "num_test": num_test} | wrong,
        notes=("some training diverged: lower --lr",) if has_diverged else (),
    )


def _over_noise(task: "LabelNoise", figures: Mapping[str, Measured]) -> dict[str, FigureCurve]:
    """Return accuracy after the last epoch over the share of noise, for each way and kind of more than one share."""
    curves: dict[str, FigureCurve] = {}
    for way in task.ways:
        for kind in ("symmetric", "asymmetric"):
            of_kind = [noise for noise in task.noises if noise.kind == kind]
            points = sorted((noise.share, figures[f"{way}_{noise.name}"].value) for noise in of_kind)
            if len(points) > 1:
                curves[f"{way}_{kind}"] = FigureCurve(
                    title=f"{WAYS[way].capitalize()}, {kind} label noise",
                    caption="Share of test samples that are classified rightly after the last epoch.",
                    over="share of training labels drawn again" if kind == "symmetric" else "share of wrong labels",
                    points=tuple(points),
                )
    return curves


def _noisy_labels(noise: "Noise", inputs: Inputs) -> Tensor:
    labels, num_classes = all_labels(inputs.set_of("train")), inputs.num_classes
    targets = None
    if noise.kind == "asymmetric":
        targets = asymmetric_targets(inputs.class_names("train"), num_classes)
    return flip_labels(labels, noise.share, num_classes=num_classes, seed=inputs.seed, targets=targets)


def _training(task: "LabelNoise", inputs: Inputs, way: str, noise: "Noise", labels: Tensor) -> Training:
    title = "fine-tune" if way == "finetune" else "train from scratch"
    return Training(
        name=f"{title}, {noise}",
        recipe=task.recipe("scratch" if way == "scratch" else "finetune"),
        labels=labels,
        tested_on="test",
        tested_labels=all_labels(inputs.set_of("test")),
        every_epoch=True,
    )


def _learn_all_linear(
    task: "LabelNoise", inputs: Inputs, noisy: "Mapping[Noise, Tensor]"
) -> "dict[Noise, tuple[list[float], float]]":
    """Learn from each of the noisy labels on the first rank, and tell all."""
    found: dict[Noise, tuple[list[float], float]] = {}
    if inputs.world.world_size == 1:
        return {noise: _learn_linear(task, inputs, labels) for noise, labels in noisy.items()}
    with distributed.leaving_together():
        if inputs.world.rank == 0:
            found = {noise: _learn_linear(task, inputs, labels) for noise, labels in noisy.items()}
    return distributed.tell_all(found)


def _learn_linear(task: "LabelNoise", inputs: Inputs, noisy: Tensor) -> tuple[list[float], float]:
    """Return the accuracy on the test set after each epoch, and the learning rate, chosen on noisy training labels."""
    assert task.linear_lr is not None
    train, test = (inputs.features(Want(split=split)) for split in ("train", "test"))
    values, labels = near(train.values, inputs.device), noisy[train.index]
    rate = task.linear_lr[0]
    if len(task.linear_lr) > 1:
        fits, decides = choice_split(labels, seed=inputs.seed)
        held_out = Features(
            values=values[decides.to(values.device)], labels=labels[decides], index=train.index[decides]
        )
        shares = _fit(task, inputs, values, labels, fits, task.linear_lr, held_out)[-1]
        rate = task.linear_lr[max(range(len(shares)), key=lambda number: shares[number])]
    curve = _fit(task, inputs, values, labels, torch.arange(len(labels)), (rate,), test)
    return [shares[0] for shares in curve], rate


def _fit(
    task: "LabelNoise",
    inputs: Inputs,
    values: Tensor,
    labels: Tensor,
    rows: Tensor,
    rates: Sequence[float],
    tested: Features,
) -> list[list[float]]:
    """Train heads on rows of features; return the share of samples that each names rightly after each epoch."""
    scaler = Scaler(values, rows)
    heads = LinearHeads(
        values.shape[1],
        inputs.num_classes,
        rates,
        momentum=task.momentum,
        weight_decay=0.0,
        seed=inputs.seed,
        device=inputs.device,
    )
    found: list[list[float]] = []
    for epoch in range(task.epochs):
        batches = list(permuted_batches(len(rows), task.batch_size, seed=inputs.seed, epoch=epoch))
        for step, batch in enumerate(batches):
            picked = rows[batch]
            features = scaler(values[picked.to(values.device)].to(inputs.device))
            done = (epoch + step / len(batches)) / task.epochs
            heads.step(features, labels[picked].to(inputs.device), schedule=cosine(done))
        parts = (scaler(part.to(inputs.device)) for part in tested.values.split(_ROWS))
        ranked = heads.ranked(parts, top=1)[:, :, 0]
        found.append((ranked == tested.labels[:, None]).double().mean(dim=0).tolist())
    return found
