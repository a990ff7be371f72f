"""Search of written embeddings: the images whose vectors point most nearly in the direction of a query's."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.embedding.index import Index, Row

__all__ = ["Answer", "Hit", "answers", "as_json", "as_table", "highest", "nearest"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An image that is near a query."""

    row: Row
    similarity: float
    """Cosine of the angle between both vectors."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query and the images nearest to it, nearest first."""

    query: str
    hits: list[Hit]


@torch.no_grad()
def nearest(index: Index, queries: Tensor, k: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find the rows with the highest cosine similarity to each query, exactly; the index is read once, in chunks.

    Args:
        index: what is searched, whether its vectors have length 1 or not.
        queries: (Q, D).
        k: how many rows; all, if the index has fewer.
        device: where to compute.

    Returns:
        (Q, k) float32 similarities, highest first, and (Q, k) int64 rows; of equal ones the first row first.
    """
    asked = normalize(queries.to(device).float())
    best = asked.new_empty(len(asked), 0)
    rows = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    for first, chunk in index.chunks():
        vectors = normalize(torch.tensor(chunk).to(device).float())
        similarities, places = highest(asked @ vectors.T, k)
        best, rows = torch.cat([best, similarities], dim=1), torch.cat([rows, places + first], dim=1)
        best, order = highest(best, k)
        rows = rows.gather(1, order)
    return best.cpu(), rows.cpu()


def highest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest values of each row with their places; of equal ones the first place first.

    `topk` alone takes any of equal values: where the one after the k-th equals it, all of the row are sorted.
    """
    k = min(k, values.shape[1])
    found, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    is_open = (found[:, k - 1 : k] == found[:, k:]).any(dim=1)
    places = places[:, :k]
    if bool(is_open.any()):
        places[is_open] = values[is_open].sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(dim=1).values
    found, order = values.gather(1, places).sort(dim=1, descending=True, stable=True)
    return found, places.gather(1, order)


def answers(index: Index, names: Sequence[str], similarities: Tensor, rows: Tensor) -> list[Answer]:
    """Return what is known of the rows that were found: (Q, k) similarities and rows, by the names of the queries."""
    numbers = sorted(set(rows.flatten().tolist()))
    known = dict(zip(numbers, index.rows(numbers), strict=True))
    return [
        Answer(
            query=name,
            hits=[
                Hit(row=known[row], similarity=similarity)
                for row, similarity in zip(found.tolist(), of_query.tolist(), strict=True)
            ],
        )
        for name, found, of_query in zip(names, rows, similarities, strict=True)
    ]


def as_table(found: Sequence[Answer]) -> str:
    """Write answers as text: for each query its hits, one a line."""
    lines: list[str] = []
    for answer in found:
        lines += ["", answer.query] if lines else [answer.query]
        for hit in answer.hits:
            label = hit.row.class_name or ("" if hit.row.label is None else f"class {hit.row.label}")
            lines.append(f"  {hit.similarity:7.4f}  {hit.row.name}{f'  ({label})' if label else ''}")
    return "\n".join(lines)


def as_json(found: Sequence[Answer]) -> str:
    """Write answers as JSON: a list with an object for each query."""
    content: list[dict[str, Any]] = [
        {"query": answer.query, "hits": [{"similarity": hit.similarity, **asdict(hit.row)} for hit in answer.hits]}
        for answer in found
    ]
    return json.dumps(content, indent=1, ensure_ascii=False)
