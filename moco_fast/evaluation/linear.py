"""Training of linear classifiers: on cached features, or on live ones of augmented images."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from moco_fast import distributed
from moco_fast.checkpoint import part
from moco_fast.encoders.formats.base import digest_of
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.base import Inputs, Measured, Outcome, Want
from moco_fast.evaluation.features import feature_batches, near
from moco_fast.evaluation.heads import Classifier, LinearHeads, Scaler, cosine, permuted_batches, steps_down
from moco_fast.evaluation.labels import choice_split, mean_per_class
from moco_fast.evaluation.saving import SavedTraining
from pipelines.config import ViewConfig, ViewSpec
from pipelines.loader import Loader, open_loader, suited_to

if TYPE_CHECKING:
    from moco_fast.evaluation.tasks.linear import Linear

__all__ = ["TrainedHeads", "best_option", "measure_cached", "measure_live", "train_cached"]

Option = TypeVar("Option")

_ROWS = 8192  # features that are classified at once
_STEPS_TOGETHER = 50  # after which ranks ask each other whether one of them cannot go on


@dataclass(frozen=True, kw_only=True)
class TrainedHeads:
    """Heads on one layer."""

    heads: LinearHeads
    scaled: Callable[[Tensor], Tensor]
    """Makes their input of features."""
    scaler: Scaler | None = None
    """That does so; None: features are taken as they are."""

    @property
    def classifier(self) -> Classifier:
        """The first head, with its scaler."""
        scaler, heads = self.scaler, self.heads
        assert scaler is not None
        parts = {"mean": scaler.mean, "scale": scaler.scale, "weight": heads.weight[0], "bias": heads.bias[0]}
        return Classifier(**{name: value.to(heads.bias.device) for name, value in parts.items()})

    def ranked(self, values: Tensor, *, top: int, among: Tensor | None = None) -> Tensor:
        """Return the classes with the highest scores of every head, best first; see LinearHeads.ranked."""
        return self.heads.ranked((self.scaled(part) for part in values.split(_ROWS)), top=top, among=among)

    def scores_on(self, values: Tensor, labels: Tensor) -> list[tuple[float, float]]:
        """Return the share of samples that each head classifies rightly, and its mean cross-entropy."""
        right: list[Tensor] = []
        losses: list[Tensor] = []
        for rows, wanted in zip(values.split(_ROWS), labels.split(_ROWS), strict=True):
            logits = self.heads.logits(self.scaled(rows))  # (B, H, C)
            targets = wanted.to(logits.device)[:, None].expand(-1, logits.shape[1])
            right.append(logits.argmax(dim=2) == targets)
            losses.append(cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        shares, means = (torch.cat(parts).double().mean(dim=0).tolist() for parts in (right, losses))
        return list(zip(shares, means, strict=True))


def measure_cached(task: "Linear", inputs: Inputs) -> Outcome:
    """Train and choose a head on cached features, and test it."""
    trained, chosen, num_train = train_cached(task, inputs)
    return _test(inputs, trained, 0, chosen, num_train=num_train)


def train_cached(task: "Linear", inputs: Inputs) -> tuple[TrainedHeads, dict[str, str | float], int]:
    """Train all heads on nine tenths of the training set, and the one that is best on the rest again on all.

    Returns:
        that one alone, its layer and learning rate, and how many samples it learned from.
    """
    assert task.lr is not None
    train = {layer: inputs.features(Want(split="train", layer=layer)) for layer in task.layer}
    labels = train[task.layer[0]].labels
    values = {layer: near(features.values, inputs.device) for layer, features in train.items()}
    layer, rate = task.layer[0], task.lr[0]
    if task.needs_choice:
        fits, decides = choice_split(labels, seed=inputs.seed)
        trained = {layer: _fit(task, inputs, values[layer], labels, fits, task.lr) for layer in task.layer}
        held_out = {layer: values[layer][decides.to(values[layer].device)] for layer in task.layer}
        layer, rate = _choose(task, trained, held_out, labels[decides])
    final = _fit(task, inputs, values[layer], labels, torch.arange(len(labels)), (rate,))
    return final, {"layer": layer, "lr": rate}, len(labels)


def measure_live(task: "Linear", inputs: Inputs) -> Outcome:
    """Train heads on features of augmented images, as the authors do; collective.

    Every rank computes the features of its share of a batch, and takes the same step with those of all.

    Raises:
        RuntimeError: the backbone is not what it was before.
    """
    assert task.lr is not None
    before = digest_of(inputs.encoder)
    # With one head there is nothing to choose, and every sample is learned from.
    held_out = _hold_out(task, inputs) if task.needs_choice else None
    trained = {
        layer: TrainedHeads(heads=heads, scaled=_on(inputs)) for layer, heads in _live_heads(task, inputs).items()
    }
    what = {"task": asdict(task), "seed": inputs.seed}
    saved = SavedTraining(inputs.saving, f"linear {task.protocol}", what, world=inputs.world, device=inputs.device)
    with saved.held():
        if (record := saved.record()) is not None:
            return _outcome(record)
        num_train = _train_live(task, inputs, trained, set() if held_out is None else held_out.numbers, saved)
        if digest_of(inputs.encoder) != before:
            raise RuntimeError(
                "training the linear classifier changed the backbone, so its figures mean nothing: a bug"
            )
        layer, rate = task.layer[0], task.lr[0]
        if held_out is not None:
            layer, rate = _choose(task, trained, held_out.values, held_out.labels)
        chosen = {"layer": layer, "lr": rate}
        found = _test(inputs, trained[layer], task.lr.index(rate), chosen, num_train=num_train)
        saved.finish(asdict(found))
    return found


def _outcome(record: Mapping[str, Any]) -> Outcome:
    """Return what a training found that was finished earlier."""
    figures = {name: Measured(**values) for name, values in record["figures"].items()}
    return Outcome(figures=figures, chosen=record["chosen"], facts=record["facts"])


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """The part of the training set on which heads are compared."""

    values: Mapping[str, Tensor]
    """(N, D) of each layer."""
    labels: Tensor
    """(N,)"""
    numbers: set[int]
    """Dense sample numbers."""


def _hold_out(task: "Linear", inputs: Inputs) -> _HeldOut:
    train = {layer: inputs.features(Want(split="train", layer=layer)) for layer in task.layer}
    first = train[task.layer[0]]
    _, decides = choice_split(first.labels, seed=inputs.seed)
    return _HeldOut(
        values={layer: features.values[decides.to(features.values.device)] for layer, features in train.items()},
        labels=first.labels[decides],
        numbers=set(first.index[decides].tolist()),
    )


def _on(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    return lambda part: part.to(inputs.device)


def _heads(task: "Linear", inputs: Inputs, dim: int, rates: Sequence[float]) -> LinearHeads:
    return LinearHeads(
        dim,
        inputs.num_classes,
        rates,
        momentum=task.momentum,
        weight_decay=task.weight_decay,
        seed=inputs.seed,
        device=inputs.device,
    )


def _fit(
    task: "Linear", inputs: Inputs, values: Tensor, labels: Tensor, rows: Tensor, rates: Sequence[float]
) -> TrainedHeads:
    """Train heads on rows of features, each scaled to mean 0 and standard deviation 1 over these rows."""
    assert task.epochs is not None
    assert task.batch_size is not None
    scaler = Scaler(values, rows)
    trained = TrainedHeads(
        heads=_heads(task, inputs, values.shape[1], rates),
        scaled=lambda part: scaler(part.to(inputs.device)),
        scaler=scaler,
    )
    steps_per_epoch = max(1, len(rows) // task.batch_size)
    num_epochs = max(task.epochs, -(-(task.min_steps or 0) // steps_per_epoch))
    num_steps = num_epochs * steps_per_epoch
    step = 0
    for epoch in range(num_epochs):
        for batch in permuted_batches(len(rows), task.batch_size, seed=inputs.seed, epoch=epoch):
            chosen = rows[batch]
            features = trained.scaled(values[chosen.to(values.device)])
            trained.heads.step(features, labels[chosen].to(inputs.device), schedule=cosine(step / num_steps))
            step += 1
    return trained


def _live_heads(task: "Linear", inputs: Inputs) -> dict[str, LinearHeads]:
    assert task.lr is not None
    shapes = layer_shapes(inputs.encoder, task.layer, size=inputs.size)
    return {layer: _heads(task, inputs, shapes[layer][0], task.lr) for layer in task.layer}


def _train_live(
    task: "Linear", inputs: Inputs, trained: Mapping[str, TrainedHeads], held_out: set[int], saved: SavedTraining
) -> int:
    """Train heads on augmented images, from the last epoch on that was saved.

    Returns:
        how many labeled samples of an epoch they learned from.
    """
    assert task.epochs is not None
    assert task.batch_size is not None
    assert task.crop_scale is not None
    shards, world = inputs.set_of("train"), inputs.world
    data = suited_to(replace(inputs.data, batch_size=task.batch_size), shards)
    # The authors': RandomResizedCrop and RandomHorizontalFlip.
    recipe = ViewConfig(crop_scale=task.crop_scale, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
    views = (ViewSpec(size=inputs.size, recipe=recipe),)
    schedule = cosine if task.protocol == "v3" else steps_down((0.6, 0.8))
    bar = tqdm(
        total=task.epochs,
        desc="linear",
        unit="epoch",
        disable=world.rank > 0,
        delay=3,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    num_train, first = 0, 0
    with bar, open_loader(data, views, seed=inputs.seed, device=inputs.device, world=world, shards=shards) as loader:
        if newest := saved.newest():
            for layer, each in trained.items():
                each.heads.load_tensors(part(newest.model, layer))
            loader.load_state_dict(newest.numbers["loader"])
            num_train, first = newest.numbers["num_train"], newest.step // len(loader)
            bar.update(first)
        for epoch in range(first, task.epochs):
            heads = {layer: each.heads for layer, each in trained.items()}
            with inputs.autocast():
                shares = _shares(task, inputs, loader, held_out)
                num_learned = _train_epoch(heads, shares, inputs, task, len(loader), schedule(epoch / task.epochs))
            bar.update()
            num_train = int(distributed.all_gather_rows(torch.tensor([num_learned], device=inputs.device)).sum())
            model = {f"{name}.{key}": t for name, each in trained.items() for key, t in each.heads.tensors().items()}
            numbers = {"loader": loader.state_dict(), "num_train": num_train}
            saved.save((epoch + 1) * len(loader), model=model, optimizer={}, numbers=numbers)
    return num_train


Share = tuple[Mapping[str, Tensor], Tensor]
"""This rank's share of a step: (B, D) of each layer, and (B,) labels on the host, -1 where there is none."""


def _shares(task: "Linear", inputs: Inputs, loader: Loader, held_out: set[int]) -> Iterator[Share]:
    for features, batch in feature_batches(inputs.encoder, loader, device=inputs.device, layers=task.layer):
        keep = torch.tensor([number not in held_out for number in batch.index.tolist()])
        yield features, torch.where(keep, batch.label, -1)


def _train_epoch(
    heads: Mapping[str, LinearHeads],
    shares: Iterator[Share],
    inputs: Inputs,
    task: "Linear",
    num_steps: int,
    schedule: float,
) -> int:
    """Take the steps of an epoch with the shares of all ranks; collective.

    Ranks ask each other only now and then whether one cannot go on; until then, that one hands over shares without
    labels, which nothing is learned from.

    Returns:
        how many labeled samples of this rank were learned from.
    """
    assert task.batch_size is not None
    num_learned, failure = 0, None
    num_rows = task.batch_size // inputs.world.world_size
    blank = {layer: each.weight.new_zeros(num_rows, each.weight.shape[2]) for layer, each in heads.items()}
    for step in range(1, num_steps + 1):
        features, own = blank, torch.full((num_rows,), -1)
        if failure is None:
            try:
                features, own = next(shares)
            except (ValueError, OSError) as error:
                if inputs.world.world_size == 1:
                    raise
                failure = error
        num_learned += int((own >= 0).sum())
        labels = distributed.all_gather_rows(own.to(inputs.device))
        for layer, values in features.items():
            heads[layer].step(distributed.all_gather_rows(values), labels, schedule=schedule)
        if step % _STEPS_TOGETHER == 0 or step == num_steps:
            if failure is not None:
                raise failure
            distributed.leave_together()
    return num_learned


def _choose(
    task: "Linear", trained: Mapping[str, TrainedHeads], held_out: Mapping[str, Tensor], labels: Tensor
) -> tuple[str, float]:
    """Return layer and learning rate of the head that is best on samples that no head has learned from."""
    assert task.lr is not None
    found = {
        (layer, rate): scores
        for layer, heads in trained.items()
        for rate, scores in zip(task.lr, heads.scores_on(held_out[layer], labels), strict=True)
    }
    return best_option(found, num_samples=len(labels))


def best_option(scores: Mapping[Option, tuple[float, float]], *, num_samples: int) -> Option:
    """Return the option that classifies best on samples it was not fitted to; of several, the first.

    Shares that differ by less than a standard error say nothing on so few samples. Among such options the lowest
    cross-entropy decides, which depends less on which samples were drawn.

    Args:
        scores: of each option, the share of samples that are classified rightly and their mean cross-entropy.
        num_samples: on which they were found.
    """
    best = max(share for share, _ in scores.values())
    error = (best * (1 - best) / num_samples) ** 0.5
    near = {option: loss for option, (share, loss) in scores.items() if share >= best - error}
    # A loss that is not a number is never the lowest.
    return min(near, key=lambda option: (isnan(near[option]), near[option]))


def _test(
    inputs: Inputs, trained: TrainedHeads, head: int, chosen: dict[str, str | float], *, num_train: int
) -> Outcome:
    test = inputs.features(Want(split="test", layer=str(chosen["layer"])))
    num_classes = inputs.num_classes
    ranked = trained.ranked(test.values, top=min(5, num_classes))[:, head]
    right = ranked == test.labels[:, None]
    hits = right[:, 0]
    figures = {
        "top1": Measured(value=hits.double().mean().item(), num_trials=len(test)),
        "mean_per_class": Measured(value=mean_per_class(hits, test.labels, num_classes=num_classes)),
    }
    if num_classes > 5:
        top5 = right.any(dim=1).double().mean().item()
        figures["top5"] = Measured(value=top5, num_trials=len(test))
    return Outcome(figures=figures, chosen=chosen, facts={"num_train": num_train, "num_test": len(test)})
