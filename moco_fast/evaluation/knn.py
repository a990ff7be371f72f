"""Weighted kNN classification on frozen features (Wu et al. 2018, section 3.4; the authors' CIFAR-10 demo).

No parameter is trained, so it tells in seconds whether an encoder is learning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_fast.evaluation.features import rows_at_once

__all__ = ["Votes", "classify", "predict"]

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


def classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, temperature: float
) -> Votes:
    """Let the k nearest rows of the bank vote on each query's class, with weights exp(similarity / temperature).

    Args:
        bank: (N, D) float32, rows of length 1; may be on the host, from where it is brought part by part.
        bank_labels: (N,) int64 in 0..num_classes-1, on the device that computes.
        queries: (Q, D) float32, rows of length 1.
        num_classes: number of classes.
        k: neighbors that vote; all N if the bank is smaller.
        temperature: smaller gives near neighbors more weight.
    """
    predictions: list[Tensor] = []
    neighbors: list[Tensor] = []
    similarities: list[Tensor] = []
    for nearest, where in _neighbors(bank, queries, k, bank_labels.device):
        predictions.append(_vote(nearest, bank_labels[where], num_classes=num_classes, temperature=temperature))
        neighbors.append(where)
        similarities.append(nearest)
    return Votes(
        predictions=torch.cat(predictions), neighbors=torch.cat(neighbors), similarities=torch.cat(similarities)
    )


def predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    settings: Sequence[tuple[int, float]],
) -> dict[tuple[int, float], Tensor]:
    """Classify with several numbers of neighbors and temperatures in one pass: (Q,) int64 for each (k, temperature).

    Arguments as those of `classify`. Neighbors are looked for once, as many as the largest k.
    """
    found: dict[tuple[int, float], list[Tensor]] = {setting: [] for setting in settings}
    for nearest, where in _neighbors(bank, queries, max(k for k, _ in settings), bank_labels.device):
        labels = bank_labels[where]
        for (k, temperature), predictions in found.items():
            votes = _vote(nearest[:, :k], labels[:, :k], num_classes=num_classes, temperature=temperature)
            predictions.append(votes)
    return {setting: torch.cat(predictions) for setting, predictions in found.items()}


def _neighbors(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Give similarities and rows of the k nearest rows of the bank, (q, k) each, nearest first, part by part."""
    rows = rows_at_once(bank, device)
    for chunk in queries.split(max(_CHUNK_ELEMENTS // min(rows, len(bank)), 1)):
        of_device, nearest, where = chunk.to(device), None, None
        for begin in range(0, len(bank), rows):
            part = bank[begin : begin + rows].to(device)
            found = (of_device @ part.T).topk(min(k, len(part)), dim=1)
            similarities, numbers = found.values, found.indices + begin
            if nearest is not None and where is not None:
                similarities, order = torch.cat([nearest, similarities], dim=1).topk(min(k, begin + len(part)), dim=1)
                numbers = torch.cat([where, numbers], dim=1).gather(1, order)
            nearest, where = similarities, numbers
        assert nearest is not None
        assert where is not None
        yield nearest, where


def _vote(nearest: Tensor, labels: Tensor, *, num_classes: int, temperature: float) -> Tensor:
    # Relative to the nearest neighbor: the same vote, and no temperature overflows.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    return weights.new_zeros(len(nearest), num_classes).scatter_add_(1, labels, weights).argmax(dim=1)
