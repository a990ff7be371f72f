"""Nearest neighbors: the training samples nearest to some others, before and after training; labels are not needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import Features, evenly, set_features, spread
from moco_fast.evaluation.knn import classify
from moco_fast.evaluation.labels import common_classes, may_have_labels
from moco_fast.report.pictures import Picture, to_picture
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader, suited_to
from shards.ground.arrays import Indices
from shards.sets import ShardSet, open_set

__all__ = ["Neighbor", "Neighborhoods", "Query", "find_neighbors", "sample_pictures", "sample_pixels"]


_PICTURE_SIDE = 96  # pixels
_BATCH = 128
_MAX_LOOKED_AT = 200_000  # held-out samples searched for one of each class


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """Training sample near a query."""

    picture: Picture
    label: str
    """Its class, or its number where there is no class to judge by."""
    similarity: float
    is_right: bool | None
    """Whether it has the query's class; None: nothing tells."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """Sample and its neighbors, nearest first, after and before training."""

    picture: Picture
    label: str
    trained: list[Neighbor]
    untrained: list[Neighbor]


@dataclass(frozen=True, kw_only=True)
class Neighborhoods:
    """Samples with their neighbors."""

    queries: list[Query]
    are_held_out: bool
    """Whether training has not seen the queries."""
    are_judged: bool
    """Whether classes tell which neighbors are right."""

    def num_right(self, which: Literal["trained", "untrained"]) -> tuple[int, int]:
        """Return how many neighbors are right, and of how many."""
        shown = [neighbor.is_right for query in self.queries for neighbor in getattr(query, which)]
        return sum(map(bool, shown)), len(shown)


def find_neighbors(
    trained: Encoder,
    untrained: Encoder,
    config: Config,
    *,
    device: torch.device,
    num_queries: int,
    num_neighbors: int,
    max_bank: int,
) -> Neighborhoods:
    """Find the training samples nearest to some others, by both encoders.

    The others are held-out samples where the run has them, else training samples, which are not neighbors of
    themselves. They are not picked by hand: the first ones of evenly spread classes, where held-out and training
    samples have the same classes, else evenly spread over their set.

    Args:
        trained: the encoder after training, on `device`.
        untrained: the encoder before training, on `device`.
        config: configuration of the run, which names the shards.
        device: device that computes.
        num_queries: number of samples whose neighbors are shown.
        num_neighbors: training samples shown per sample.
        max_bank: training samples to search, evenly spread over the set.

    Raises:
        ValueError: shards are missing, or hold too few samples.
    """
    bank = open_set(config.data.shards)
    held_out = None if config.eval.shards is None else open_set(config.eval.shards)
    asked_set = bank if held_out is None else held_out
    names = None if held_out is None else _names_to_judge_by(bank, held_out)
    asked = _evenly_spread(asked_set, num_queries) if names is None else _first_of_each_class(asked_set, num_queries)
    features_of = partial(_features_of, config=config, device=device)
    near = [
        _nearest(
            _labeled(features_of(encoder, bank, spread(bank, max_bank)), only=names is not None),
            features_of(encoder, asked_set, asked),
            num_neighbors=num_neighbors,
            leave_out_itself=held_out is None,
        )
        for encoder in (trained, untrained)
    ]
    side = min(_PICTURE_SIDE, config.views.size)
    pictures_of = partial(sample_pictures, side=side, crop=config.eval.crop, data=config.data)
    query_pictures = pictures_of(asked_set, asked)
    bank_pictures = pictures_of(bank, np.unique([n.sample for of in near for n in chain(*of.neighbors)]))
    show = partial(_show, pictures=bank_pictures, names=names)
    # Of both encoders the queries are the same, in the same order.
    queries = [
        Query(
            picture=query_pictures[sample],
            label=_name(names, label, sample),
            trained=show(near[0].neighbors[row], label=label),
            untrained=show(near[1].neighbors[row], label=label),
        )
        for row, (sample, label) in enumerate(near[0].queries)
    ]
    return Neighborhoods(queries=queries, are_held_out=held_out is not None, are_judged=names is not None)


def _names_to_judge_by(bank: ShardSet, held_out: ShardSet) -> tuple[str, ...] | None:
    """Return the names of the classes that both sets have; None: no sample can be called right or wrong by its class.

    Sets of others may have labels without names.
    """
    if not (may_have_labels(bank) and may_have_labels(held_out)):
        return None
    try:
        return common_classes(bank, held_out)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Near:
    sample: int
    label: int
    similarity: float


@dataclass(frozen=True, kw_only=True)
class _Matches:
    queries: list[tuple[int, int]]
    """Sample numbers and labels."""
    neighbors: list[list[_Near]]


def _features_of(
    encoder: Encoder, shards: ShardSet, indices: Indices | None, *, config: Config, device: torch.device
) -> Features:
    return set_features(
        encoder,
        shards,
        layer=config.eval.layer,
        size=config.views.size,
        crop=config.eval.crop,
        data=replace(config.data, batch_size=_BATCH),
        device=device,
        indices=indices,
        title="report: features",
    )


def _labeled(features: Features, *, only: bool) -> Features:
    return features.rows(features.labels >= 0) if only else features


def _nearest(bank: Features, asked: Features, *, num_neighbors: int, leave_out_itself: bool) -> _Matches:
    """Find the training samples nearest to each of the given samples, nearest first."""
    if len(bank) <= leave_out_itself:
        raise ValueError("the training shards hold no sample that could be a neighbor")
    votes = classify(
        bank.values,
        bank.labels.clamp(min=0).to(bank.values.device),
        asked.values,
        num_classes=max(int(bank.labels.max()), 0) + 1,
        k=num_neighbors + leave_out_itself,
        temperature=1.0,  # It decides the vote, which is not looked at.
    )
    queries = list(zip(asked.index.tolist(), asked.labels.tolist(), strict=True))
    neighbors = [
        [
            _Near(sample=int(bank.index[place]), label=int(bank.labels[place]), similarity=similarity)
            for place, similarity in zip(places, similarities, strict=True)
            if not (leave_out_itself and int(bank.index[place]) == sample)
        ][:num_neighbors]
        for (sample, _), places, similarities in zip(
            queries, votes.neighbors.tolist(), votes.similarities.tolist(), strict=True
        )
    ]
    return _Matches(queries=queries, neighbors=neighbors)


def _evenly_spread(shards: ShardSet, wanted: int) -> Indices:
    if not shards.num_samples:
        raise ValueError(f"{shards.where} holds no sample")
    return evenly(shards.num_samples, min(wanted, shards.num_samples))


def _first_of_each_class(shards: ShardSet, wanted: int) -> Indices:
    """Return dense numbers of the first samples of evenly spread classes, ordered by label."""
    num_shards = 1 + int(np.searchsorted(shards.shard_sizes.cumsum(), _MAX_LOOKED_AT))
    labels = np.concatenate([shards.index(shard)["label"] for shard in range(shards.num_shards)[:num_shards]])
    classes, first = np.unique(labels, return_index=True)
    first = first[classes >= 0]
    if not len(first):
        raise ValueError(f"{shards.where} holds no labeled sample")
    chosen = np.unique(np.linspace(0, len(first) - 1, min(wanted, len(first))).round().astype(int))
    return first[chosen].astype(np.int64)


def sample_pictures(
    shards: ShardSet, samples: Indices, *, side: int, crop: float, data: DataConfig
) -> dict[int, Picture]:
    """Return the central squares of some samples as pictures, by dense sample number."""
    pixels = sample_pixels(shards, samples, side=side, crop=crop, data=data)
    return {sample: to_picture(image) for sample, image in pixels.items()}


def sample_pixels(
    shards: ShardSet, samples: Indices, *, side: int, crop: float, data: DataConfig
) -> dict[int, npt.NDArray[np.uint8]]:
    """Return the central squares of some samples, (side, side, 3), by dense sample number."""
    found: dict[int, npt.NDArray[np.uint8]] = {}
    with open_loader(
        replace(suited_to(data, shards), batch_size=64), central_crop(side, side=crop), samples=samples, shards=shards
    ) as loader:
        for batch in loader:
            pixels = batch.views[0].permute(0, 2, 3, 1).numpy().copy()  # (B, H, W, 3); the loader uses its memory again
            found |= dict(zip(batch.index.tolist(), pixels, strict=True))
    return found


def _show(
    row: Sequence[_Near], *, label: int, pictures: dict[int, Picture], names: tuple[str, ...] | None
) -> list[Neighbor]:
    return [
        Neighbor(
            picture=pictures[near.sample],
            label=_name(names, near.label, near.sample),
            similarity=near.similarity,
            is_right=None if names is None else near.label == label,
        )
        for near in row
    ]


def _name(names: tuple[str, ...] | None, label: int, sample: int) -> str:
    if names is None:
        return f"sample {sample:,}"
    return names[label] if label < len(names) else f"class {label}"
