"""Embedding from Python: the vectors of all images, in memory."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from moco_fast.embedding.images import are_shards, pack_images, rejected
from moco_fast.embedding.stream import Vectors, divide, embed_parts
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.layers import check_layer
from pipelines.config import DataConfig
from shards.sets import ShardSet, open_set

__all__ = ["Embeddings", "embed"]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """N images as vectors, with what is known of each."""

    values: npt.NDArray[np.float32]
    """(N, D), each of length 1 unless asked otherwise: their products are cosine similarities."""
    labels: npt.NDArray[np.int64]
    """(N,), -1 where there is none."""
    class_names: tuple[str, ...]
    """Name of each label."""
    names: tuple[str, ...]
    """(N,) where each image comes from; empty for shards that do not say."""
    rejected: tuple[str, ...] = ()
    """Images that could not be read, each with the reason; they have no vector."""

    def __len__(self) -> int:
        return len(self.values)

    def nearest(self, query: int, k: int) -> list[tuple[int, float]]:
        """Find the k images most similar to one of them: (row, cosine similarity), nearest first, itself left out."""
        similarities = self.values @ self.values[query]
        order = np.argsort(-similarities, kind="stable")
        return [(int(row), float(similarities[row])) for row in order if row != query][:k]


def embed(
    encoder: Encoder,
    images: str | Path,
    *,
    layer: str = "backbone",
    normalize: bool = True,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Embeddings:
    """Compute the vectors of all images of a set of shards, or of a folder, in memory.

    `moco-fast embed` writes them to files instead, of sets of any size and with several GPUs.

        encoder = moco_fast.load_encoder("runs/first")
        found = moco_fast.embed(encoder, "photos")
        print([found.names[row] for row, _ in found.nearest(0, k=5)])

    Args:
        encoder: from `load_encoder`; it is moved to the device.
        images: shards (a folder, an address or a .beton), or anything that `make-shards pack` takes, such as a folder
            of images, which is packed into a temporary folder first: pack large ones yourself.
        layer: whose output the vectors are: backbone, head, or stage1 to stage5 of a ResNet.
        normalize: scale every vector to length 1.
        batch_size: images computed at once.
        device: `auto`: a GPU where there is one.

    Raises:
        ValueError: there are no such images, or none that can be read; or the encoder's output is not finite.
    """
    on = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    vectors = Vectors(
        encoder=encoder.to(on),
        size=encoder.image_size,
        crop=encoder.crop,
        layer=check_layer(layer),
        normalize=normalize,
        batch_size=batch_size,
        data=DataConfig(shards=""),
        device=on,
    )
    path = str(images)
    if are_shards(path):
        return _in_memory(vectors, open_set(path))
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "shards"
        shards = pack_images(path, packed)
        return _in_memory(vectors, shards, rejected(packed))


def _in_memory(vectors: Vectors, shards: ShardSet, before: list[str] | None = None) -> Embeddings:
    dim = vectors.dim()
    parts = divide(shards.num_samples, row_bytes=4 * dim, batch_size=vectors.batch_size)
    rows = list(embed_parts(vectors, shards, parts))
    sources = [source for part in rows for source in part.sources]
    damaged = [each.reason for part in rows for each in part.damaged]
    return Embeddings(
        values=np.concatenate([np.empty((0, dim), dtype=np.float32), *(part.values for part in rows)]),
        labels=np.concatenate([np.empty(0, dtype=np.int64), *(part.labels for part in rows)]),
        class_names=shards.class_names,
        names=() if None in sources else tuple(str(source) for source in sources),
        rejected=(*(before or ()), *damaged),
    )
