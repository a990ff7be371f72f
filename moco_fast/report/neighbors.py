"""What an encoder finds alike: the training samples nearest to some held-out ones, before and after training."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import labeled_features, spread
from moco_fast.evaluation.knn import classify, common_classes
from moco_fast.report.pictures import Picture, to_picture
from pipelines.config import DataConfig
from pipelines.loader import open_eval_loader
from shards.ground.arrays import Indices
from shards.sets import open_set

__all__ = ["Neighbor", "Query", "find_neighbors"]


_PICTURE_SIDE = 96  # pixels
_MAX_LOOKED_AT = 200_000  # held-out samples among which one of each class is looked for


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A training sample that is near a query."""

    picture: Picture
    label: str
    similarity: float
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class Query:
    """A held-out sample and what is nearest to it, nearest first, after and before training."""

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
    """Look up the training samples nearest to some held-out samples, by both encoders.

    The held-out samples are not picked by hand: the first one of each of some evenly spread classes.

    Args:
        trained: after training, on `device`.
        untrained: before training, on `device`.
        config: of the run; it names the shards.
        device: where to compute.
        num_queries: held-out samples.
        num_neighbors: training samples shown for each.
        max_bank: training samples to choose from, evenly spread over the set.

    Raises:
        ValueError: shards that are absent, without labels, or with different classes.
    """
    query_shards, bank_shards = config.eval.shards, config.data.shards
    assert query_shards is not None
    names = common_classes(bank_shards, query_shards)
    asked, labels = _first_of_each_class(query_shards, num_queries)
    near = [
        _nearest(encoder, config, asked, device=device, num_neighbors=num_neighbors, max_bank=max_bank)
        for encoder in (trained, untrained)
    ]
    side = min(_PICTURE_SIDE, config.views.size)
    pictures_of = partial(_pictures, side=side, crop=config.eval.crop, data=config.data)
    query_pictures = pictures_of(query_shards, asked)
    bank_pictures = pictures_of(bank_shards, np.unique([n.sample for rows in near for row in rows for n in row]))

    def show(row: list[_Near], label: int) -> list[Neighbor]:
        return [
            Neighbor(
                picture=bank_pictures[near.sample],
                label=_name(names, near.label),
                similarity=near.similarity,
                is_right=near.label == label,
            )
            for near in row
        ]

    return [
        Query(
            picture=query_pictures[sample],
            label=_name(names, label),
            trained=show(near[0][row], label),
            untrained=show(near[1][row], label),
        )
        for row, (sample, label) in enumerate(zip(asked.tolist(), labels.tolist(), strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class _Near:
    sample: int
    label: int
    similarity: float


def _nearest(
    encoder: Encoder, config: Config, asked: Indices, *, device: torch.device, num_neighbors: int, max_bank: int
) -> list[list[_Near]]:
    """Look up the training samples nearest to each of the samples asked for, nearest first."""
    assert config.eval.shards is not None
    features_of = partial(
        labeled_features,
        encoder,
        layer=config.eval.layer,
        size=config.views.size,
        crop=config.eval.crop,
        batch_size=128,
        device=device,
        data=config.data,
    )
    bank_shards = config.data.shards
    bank = features_of(bank_shards, indices=spread(bank_shards, max_bank), title="report: features")
    if not len(bank):
        raise ValueError(f"{bank_shards} holds no labeled sample")
    votes = classify(
        bank.values,
        bank.labels.to(device),
        features_of(config.eval.shards, indices=asked).values,
        num_classes=int(bank.labels.max()) + 1,
        k=num_neighbors,
        temperature=config.eval.temperature,
    )
    return [
        [
            _Near(sample=int(bank.index[place]), label=int(bank.labels[place]), similarity=similarity)
            for place, similarity in zip(places, similarities, strict=True)
        ]
        for places, similarities in zip(votes.neighbors.tolist(), votes.similarities.tolist(), strict=True)
    ]


def _first_of_each_class(shards: str, wanted: int) -> tuple[Indices, Indices]:
    """Return dense numbers and labels of the first samples of evenly spread classes, in order of labels."""
    opened = open_set(shards)
    num_shards = 1 + int(np.searchsorted(opened.shard_sizes.cumsum(), _MAX_LOOKED_AT))
    labels = np.concatenate([opened.index(shard)["label"] for shard in range(opened.num_shards)[:num_shards]])
    classes, first = np.unique(labels, return_index=True)
    classes, first = classes[classes >= 0], first[classes >= 0]
    if not len(classes):
        raise ValueError(f"{shards} holds no labeled sample")
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(wanted, len(classes))).round().astype(int))
    return first[chosen].astype(np.int64), classes[chosen].astype(np.int64)


def _pictures(shards: str, samples: Indices, *, side: int, crop: float, data: DataConfig) -> dict[int, Picture]:
    """Central squares of some samples, by dense sample number."""
    loader = open_eval_loader(
        shards, size=side, crop=crop, batch_size=64, device=torch.device("cpu"), indices=samples, data=data
    )
    pictures: dict[int, Picture] = {}
    try:
        for batch in loader:
            pixels = batch.views[0].permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
            pictures |= {int(sample): to_picture(image) for sample, image in zip(batch.index, pixels, strict=True)}
    finally:
        loader.close()
    return pictures


def _name(names: tuple[str, ...], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"
