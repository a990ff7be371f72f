"""Queries of a search: embedded as the index was."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moco_fast.embedding.images import rejected
from moco_fast.embedding.index import Index
from moco_fast.embedding.stream import Vectors, divide, embed_parts
from moco_fast.encoders.open import open_encoder
from pipelines.config import DataConfig
from shards.sets import ShardSet

__all__ = ["Queries", "embed_queries"]


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Q images to look for."""

    names: tuple[str, ...]
    """Q, where they come from."""
    values: Tensor
    """(Q, D) float32."""


def embed_queries(index: Index, queries: ShardSet, *, encoder: str | None, device: torch.device) -> Queries:
    """Compute the vectors of queries by the encoder, the layer and the view of an index.

    Args:
        index: that is searched.
        queries: images, packed.
        encoder: where the encoder is; None: where it was when the index was written.
        device: where to compute.

    Raises:
        ValueError: the encoder is not there, or is another one; a query cannot be read.
    """
    if refused := rejected(Path(queries.where)):
        raise ValueError(f"a query cannot be read: {refused[0]}")
    settings = index.settings
    where = encoder or index.header["encoder"]
    opened = open_encoder(where, which=index.header["which"], image_size=settings["size"])
    if opened.digest != settings["encoder"]:
        raise ValueError(
            f"{index.path} was written with another encoder than {where} is now, so distances would mean nothing: name "
            "that encoder or checkpoint with --encoder, or embed the images again"
        )
    # Half precision of a GPU's only matters for its speed.
    precision = settings["precision"] if device.type == "cuda" or settings["precision"] == "bf16" else "fp32"
    vectors = Vectors(
        encoder=opened.encoder.to(device),
        size=settings["size"],
        crop=settings["crop"],
        layer=settings["layer"],
        batch_size=64,
        data=DataConfig(shards=""),
        device=device,
        precision=precision,
    )
    parts = divide(queries.num_samples, row_bytes=4 * vectors.dim(), batch_size=vectors.batch_size)
    found = list(embed_parts(vectors, queries, parts))
    if damaged := [each.reason for rows in found for each in rows.damaged]:
        raise ValueError(f"a query cannot be read: {damaged[0]}")
    return Queries(
        names=tuple(str(source) for rows in found for source in rows.sources),
        values=torch.cat([torch.from_numpy(rows.values) for rows in found]),
    )
