"""Weighted kNN classification on frozen features (Wu et al. 2018, section 3.4; the authors' CIFAR-10 demo).

No parameter is trained, so it tells in seconds whether an encoder is learning.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moco_fast.config import KnnConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import Features, gather, labeled_features, spread
from pipelines.config import DataConfig
from shards.sets import open_set

__all__ = ["KnnResult", "Votes", "classify", "common_classes", "evaluate_knn"]

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
    bank_shards: str,
    query_shards: str,
    size: int,
    batch_size: int = 256,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 1,
    data: DataConfig | None = None,
) -> KnnResult:
    """Classify held-out samples by their nearest training samples; collective: every rank calls it and gets the result.

    Each rank computes its share of the features and classifies its share of the queries.

    Args:
        encoder: on `device`; its modes are left as they were.
        knn: the settings; k is capped to the bank, with a note.
        bank_shards: labeled training shards.
        query_shards: labeled held-out shards with the same classes.
        size: height and width of the images in pixels.
        batch_size: images a rank takes at once.
        device: where to compute.
        rank: this process.
        world_size: processes.
        local_world_size: processes on this machine.
        data: of the run: its cache for remote shards, and what is done about samples that cannot be read.

    Raises:
        ValueError: shards without labels, with different classes, or features that are not finite.
    """
    num_classes = len(common_classes(bank_shards, query_shards))
    features_of = partial(
        labeled_features,
        encoder,
        layer=knn.layer,
        size=size,
        crop=knn.crop,
        batch_size=batch_size,
        device=device,
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        data=data,
    )
    bank = gather(features_of(bank_shards, indices=spread(bank_shards, knn.max_bank), title="features of the bank"))
    queries = features_of(query_shards, title="features of the queries")
    counts = _count(bank, queries, num_classes=num_classes, k=knn.k, temperature=knn.temperature)
    if world_size > 1:
        dist.all_reduce(counts)
    right, num_queries, num_broken = counts.tolist()
    if num_broken:
        raise ValueError("the encoder's features are not finite: it has diverged, evaluate an earlier checkpoint")
    if not len(bank) or not num_queries:
        empty = bank_shards if not len(bank) else query_shards
        raise ValueError(f"{empty} holds no labeled sample, so kNN has nothing to compare: pack it with labels")
    note = f"k = {knn.k} neighbors were asked for, but the bank holds {len(bank)}: all of them vote"
    return KnnResult(
        top1=right / num_queries,
        num_bank=len(bank),
        num_queries=num_queries,
        k=min(knn.k, len(bank)),
        note=note if knn.k > len(bank) else None,
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


def common_classes(bank_shards: str, query_shards: str) -> tuple[str, ...]:
    """Return the class names that two sets of shards share, in the order of their labels.

    Raises:
        ValueError: the sets number their classes differently.
    """
    bank, queries = (open_set(path).class_names for path in (bank_shards, query_shards))
    if bank == queries:
        return bank
    odd = sorted(set(bank) ^ set(queries))
    what = f"{odd[0]!r} is in one only" if odd else "the same names in another order"
    raise ValueError(
        f"{bank_shards} and {query_shards} number their classes differently ({what}): pack both from folders with the "
        "same class names"
    )
