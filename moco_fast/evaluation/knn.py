"""Weighted kNN classification on frozen features (Wu et al. 2018, section 3.4; the authors' CIFAR-10 demo).

No parameter is trained, so it tells in seconds whether an encoder is learning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast.config import Config, KnnConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import RunSets, Score
from moco_fast.evaluation.features import Features, gather, labeled_features, spread
from pipelines.config import DataConfig
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["KnnEvaluation", "KnnResult", "Votes", "classify", "common_classes", "evaluate_knn"]

_CHUNK_ELEMENTS = 1 << 25  # similarities held at once: 128 MiB of float32


@dataclass(frozen=True, kw_only=True)
class Votes:
    """What the neighbors of Q queries say."""

    predictions: Tensor
    """(Q,) int64: the class with the largest sum of weights."""
    neighbors: Tensor
    """(Q, k) int64: rows of the bank, nearest first."""
    similarities: Tensor
    """(Q, k) float32: their cosine similarities."""


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """How well neighbors among the training samples name the class of held-out samples."""

    top1: float
    """Share of queries classified rightly, 0..1."""
    num_bank: int
    """Labeled training samples that served as neighbors."""
    num_queries: int
    """Labeled held-out samples that were classified."""
    k: int
    """Neighbors that voted."""
    note: str | None = None
    """What was done otherwise than asked, in one line."""


def classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, temperature: float
) -> Votes:
    """Let the k nearest rows of the bank vote on each query's class, with weights exp(similarity / temperature).

    Args:
        bank: (N, D) float32, rows of length 1.
        bank_labels: (N,) int64 in 0..num_classes-1, on the same device.
        queries: (Q, D) float32, rows of length 1.
        num_classes: number of classes.
        k: neighbors that vote; all N if the bank is smaller.
        temperature: smaller gives near neighbors more weight.
    """
    k = min(k, len(bank))
    rows = max(_CHUNK_ELEMENTS // len(bank), 1)
    predictions: list[Tensor] = []
    neighbors: list[Tensor] = []
    similarities: list[Tensor] = []
    for chunk in queries.split(rows):
        nearest, where = (chunk @ bank.T).topk(k, dim=1)  # (q, k) each, nearest first
        # Relative to the nearest neighbor: the same vote, and no temperature overflows.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[where], weights)
        predictions.append(votes.argmax(dim=1))
        neighbors.append(where)
        similarities.append(nearest)
    return Votes(
        predictions=torch.cat(predictions), neighbors=torch.cat(neighbors), similarities=torch.cat(similarities)
    )


def evaluate_knn(
    encoder: Encoder,
    knn: KnnConfig,
    *,
    bank: ShardSet,
    queries: ShardSet,
    size: int,
    data: DataConfig,
    device: torch.device,
    world: World = World(),
) -> KnnResult:
    """Classify held-out samples by their nearest training samples; collective: every rank calls it and gets the result.

    Each rank computes its share of the features and classifies its share of the queries.

    Args:
        encoder: on `device`; its modes are left as they were.
        knn: the settings; k is capped to the bank, with a note.
        bank: labeled training samples.
        queries: labeled held-out samples with the same classes.
        size: height and width of the images in pixels.
        data: of the run: its batch size, backend and cache, and what is done about samples that cannot be read.
        device: where to compute.
        world: this process and how many take part.

    Raises:
        ValueError: shards without labels, with different classes, or features that are not finite.
    """
    num_classes = len(common_classes(bank, queries))
    features_of = partial(
        labeled_features,
        encoder,
        layer=knn.layer,
        size=size,
        crop=knn.crop,
        data=data,
        device=device,
        world=world,
    )
    banked = gather(features_of(bank, indices=spread(bank, knn.max_bank), title="features of the bank"))
    asked = features_of(queries, title="features of the queries")
    counts = _count(banked, asked, num_classes=num_classes, k=knn.k, temperature=knn.temperature)
    if world.world_size > 1:
        dist.all_reduce(counts)
    right, num_queries, num_broken = counts.tolist()
    if num_broken:
        raise ValueError("the encoder's features are not finite: it has diverged, evaluate an earlier checkpoint")
    if not len(banked) or not num_queries:
        empty = bank if not len(banked) else queries
        raise ValueError(f"{empty.where} holds no labeled sample, so kNN has nothing to compare: pack it with labels")
    note = f"k = {knn.k} neighbors were asked for, but the bank holds {len(banked)}: all of them vote"
    return KnnResult(
        top1=right / num_queries,
        num_bank=len(banked),
        num_queries=num_queries,
        k=min(knn.k, len(banked)),
        note=note if knn.k > len(banked) else None,
    )


def _count(bank: Features, queries: Features, *, num_classes: int, k: int, temperature: float) -> Tensor:
    """Count queries classified rightly, queries, and numbers that are not finite: (3,) int64 on the device."""
    counts = torch.zeros(3, dtype=torch.int64, device=bank.values.device)
    counts[1] = len(queries)
    counts[2] = (~queries.values.isfinite()).sum() + (~bank.values.isfinite()).sum()
    if len(queries) and len(bank):
        votes = classify(
            bank.values,
            bank.labels.to(bank.values.device),
            queries.values,
            # Shards that others wrote may have labels without names.
            num_classes=max(num_classes, int(bank.labels.max()) + 1),
            k=k,
            temperature=temperature,
        )
        counts[0] = (votes.predictions.cpu() == queries.labels).sum()
    return counts


def common_classes(bank: ShardSet, queries: ShardSet) -> tuple[str, ...]:
    """Return the class names that two sets of shards share, in the order of their labels.

    Raises:
        ValueError: the sets number their classes differently.
    """
    if bank.class_names == queries.class_names:
        return bank.class_names
    odd = sorted(set(bank.class_names) ^ set(queries.class_names))
    what = f"{odd[0]!r} is in one only" if odd else "the same names in another order"
    raise ValueError(
        f"{bank.where} and {queries.where} number their classes differently ({what}): pack both from folders with the "
        "same class names"
    )


@dataclass(frozen=True, kw_only=True)
class KnnEvaluation:
    """The kNN classification that a run does at intervals."""

    knn: KnnConfig
    bank: ShardSet
    queries: ShardSet
    size: int
    """Height and width of the images in pixels."""
    data: DataConfig
    """Of the run."""

    @classmethod
    def open(cls, config: Config, sets: RunSets) -> Self | None:
        """Take the run's sets; None without --eval.shards. Raises ValueError: nothing tells the training labels."""
        if sets.held_out is None:
            return None
        if sets.training is None:
            raise ValueError(
                f"--eval.shards {config.eval.shards} is compared with the training samples, whose labels nothing "
                f"tells: `make-shards index {config.data.shards}` does, or leave out --eval.shards"
            )
        return cls(knn=config.eval, bank=sets.training, queries=sets.held_out, size=config.views.size, data=config.data)

    @classmethod
    def scores(cls, config: Config) -> tuple[Score, ...]:
        """Show the accuracy; see Evaluation."""
        return (
            Score(
                name="kNN top-1",
                title="kNN accuracy",
                caption=f"Share of held-out samples whose {config.eval.k} nearest training samples vote for the right "
                "class.",
                curves={"knn/top1": ""},
                best="highest",
                percent=True,
            ),
        )

    def figures(self, encoder: Encoder, *, device: torch.device, world: World) -> dict[str, float]:
        """Classify the queries; see Evaluation."""
        result = evaluate_knn(
            encoder,
            self.knn,
            bank=self.bank,
            queries=self.queries,
            size=self.size,
            data=self.data,
            device=device,
            world=world,
        )
        return {"knn/top1": result.top1, "knn/num_bank": result.num_bank, "knn/num_queries": result.num_queries}

    def line(self, figures: Mapping[str, float]) -> str:
        """Give the accuracy."""
        return f"kNN top-1 {100 * figures['knn/top1']:.1f}%"
