"""Nearest neighbors: the training samples nearest to some held-out ones, before and after training."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import Features, labeled_features, spread
from moco_fast.evaluation.knn import classify
from moco_fast.evaluation.labels import common_classes
from moco_fast.report.pictures import Picture, to_picture
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader, suited_to
from shards.ground.arrays import Indices
from shards.sets import ShardSet, open_set

__all__ = ["Neighbor", "Query", "find_neighbors", "sample_pictures", "sample_pixels"]


_PICTURE_SIDE = 96  # pixels
_BATCH = 128
_MAX_LOOKED_AT = 200_000  # held-out samples searched for one of each class


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """Training sample near a query."""

    picture: Picture
    label: str
    similarity: float
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Query:
    """Held-out sample and its neighbors, nearest first, after and before training."""

    picture: Picture
    label: str
    trained: list[Neighbor]
    untrained: list[Neighbor]


def find_neighbors(
    trained: Encoder,
    untrained: Encoder,
    config: Config,
    *,
    device: torch.device,
    num_queries: int,
    num_neighbors: int,
    max_bank: int,
) -> list[Query]:
    """Find the training samples nearest to some held-out samples, by both encoders.

    The held-out samples are not picked by hand: they are the first of their class, for classes spread evenly.

    Args:
        trained: the encoder after training, on `device`.
        untrained: the encoder before training, on `device`.
        config: configuration of the run, which names the shards.
        device: device that computes.
        num_queries: number of held-out samples.
        num_neighbors: training samples shown per held-out sample.
        max_bank: training samples to search, evenly spread over the set.

    Raises:
        ValueError: shards are missing, have no labels, or have different classes.
    """
    assert config.eval.shards is not None
    bank, held_out = open_set(config.data.shards), open_set(config.eval.shards)
    names = common_classes(bank, held_out)
    asked, labels = _first_of_each_class(held_out, num_queries)
    features_of = partial(_features_of, config=config, device=device)
    near = [
        _nearest(
            features_of(encoder, bank, indices=spread(bank, max_bank)),
            features_of(encoder, held_out, indices=asked),
            num_neighbors=num_neighbors,
            temperature=config.eval.temperature,
        )
        for encoder in (trained, untrained)
    ]
    side = min(_PICTURE_SIDE, config.views.size)
    pictures_of = partial(sample_pictures, side=side, crop=config.eval.crop, data=config.data)
    query_pictures = pictures_of(held_out, asked)
    bank_pictures = pictures_of(bank, np.unique([n.sample for rows in near for row in rows for n in row]))
    show = partial(_show, pictures=bank_pictures, names=names)
    return [
        Query(
            picture=query_pictures[sample],
            label=_name(names, label),
            trained=show(near[0][row], label=label),
            untrained=show(near[1][row], label=label),
        )
        for row, (sample, label) in enumerate(zip(asked.tolist(), labels.tolist(), strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class _Near:
    sample: int
    label: int
    similarity: float


def _features_of(
    encoder: Encoder, shards: ShardSet, *, indices: Indices | None, config: Config, device: torch.device
) -> Features:
    return labeled_features(
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


def _nearest(bank: Features, asked: Features, *, num_neighbors: int, temperature: float) -> list[list[_Near]]:
    """Find the training samples nearest to each of the given samples, nearest first."""
    if not len(bank):
        raise ValueError("the training shards hold no labeled sample")
    votes = classify(
        bank.values,
        bank.labels.to(bank.values.device),
        asked.values,
        num_classes=int(bank.labels.max()) + 1,
        k=num_neighbors,
        temperature=temperature,
    )
    return [
        [
            _Near(sample=int(bank.index[place]), label=int(bank.labels[place]), similarity=similarity)
            for place, similarity in zip(places, similarities, strict=True)
        ]
        for places, similarities in zip(votes.neighbors.tolist(), votes.similarities.tolist(), strict=True)
    ]


def _first_of_each_class(shards: ShardSet, wanted: int) -> tuple[Indices, Indices]:
    """Return dense numbers and labels of the first samples of evenly spread classes, ordered by label."""
    num_shards = 1 + int(np.searchsorted(shards.shard_sizes.cumsum(), _MAX_LOOKED_AT))
    labels = np.concatenate([shards.index(shard)["label"] for shard in range(shards.num_shards)[:num_shards]])
    classes, first = np.unique(labels, return_index=True)
    classes, first = classes[classes >= 0], first[classes >= 0]
    if not len(classes):
        raise ValueError(f"{shards.where} holds no labeled sample")
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(wanted, len(classes))).round().astype(int))
    return first[chosen].astype(np.int64), classes[chosen].astype(np.int64)


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


def _show(row: "list[_Near]", *, label: int, pictures: dict[int, Picture], names: tuple[str, ...]) -> list[Neighbor]:
    return [
        Neighbor(
            picture=pictures[near.sample],
            label=_name(names, near.label),
            similarity=near.similarity,
            is_right=near.label == label,
        )
        for near in row
    ]


def _name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"
