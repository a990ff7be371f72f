"""Embedding: images in, one vector per image out."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from moco_fast.config import Layer
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.features import extract
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import ShardSet, open_set
from shards.sets.registry import may_be_set

__all__ = ["Embeddings", "embed"]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """N images as vectors, with what is known of each."""

    values: npt.NDArray[np.float32]
    """(N, D), each of length 1: their products are cosine similarities."""
    labels: npt.NDArray[np.int64]
    """(N,), -1 where there is none."""
    class_names: tuple[str, ...]
    """Name of each label."""
    names: tuple[str, ...]
    """(N,) where each image comes from; empty for shards that do not say."""
    rejected: tuple[str, ...] = ()
    """Images of a folder that could not be read, each with the reason; they have no vector."""

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
    layer: Layer = "backbone",
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Embeddings:
    """Compute the vectors of all images of a set of shards, or of a folder.

        encoder = moco_fast.load_encoder("runs/first")
        found = moco_fast.embed(encoder, "photos")
        print([found.names[row] for row, _ in found.nearest(0, k=5)])

    Args:
        encoder: from `load_encoder`; it is moved to the device.
        images: shards (a folder, an address or a .beton), or anything that `make-shards pack` takes, such as a folder
            of images, which is packed into a temporary folder first: pack large ones yourself.
        layer: whose output the vectors are: the backbone's or the head's.
        batch_size: images computed at once.
        device: `auto`: a GPU where there is one.

    Raises:
        ValueError: there are no such images, or none that can be read; or the encoder's output is not finite.
    """
    on = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    path = str(images)
    if _are_shards(path):
        return _embed_shards(encoder.to(on), path, layer=layer, batch_size=batch_size, device=on)
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "shards")
        pack(PackConfig(sources=(path,), out=packed, shuffle=False, mean_rgb=False))
        found = _embed_shards(encoder.to(on), packed, layer=layer, batch_size=batch_size, device=on)
        return _with_rejected(found, Path(packed))


def _are_shards(path: str) -> bool:
    return "," in path or may_be_set(path)


def _embed_shards(encoder: Encoder, path: str, *, layer: Layer, batch_size: int, device: torch.device) -> Embeddings:
    shards = open_set(path)
    samples = np.arange(shards.num_samples)
    views = central_crop(encoder.image_size, side=encoder.crop)
    data = DataConfig(shards=path, batch_size=batch_size)
    with open_loader(data, views, samples=samples, device=device, shards=shards) as loader:
        features = extract(encoder, loader, device=device, layer=layer, title="embedding")
    if not features.values.isfinite().all():
        raise ValueError("the encoder's output is not finite: it has diverged, take an earlier checkpoint")
    names = tuple(_names(shards))
    return Embeddings(
        values=features.values.cpu().numpy(),
        labels=features.labels.numpy(),
        class_names=shards.class_names,
        names=names if len(names) == len(features) else (),
    )


def _names(shards: ShardSet) -> Iterator[str]:
    """Where the samples of local folders come from, in order; nothing where the shards do not say."""
    for shard in range(shards.num_shards):
        part, number = shards.part(shard)
        path = Path(part.where) / f"{part.manifest.shards[number].stem}.sources.txt"
        if part.kind != "local" or not path.is_file():
            return
        yield from path.read_text().splitlines()


def _with_rejected(found: Embeddings, shards: Path) -> Embeddings:
    lines = (shards / "rejected.jsonl").read_text().splitlines()
    rejected = tuple(f"{entry['source']}: {entry['reason']}" for entry in map(json.loads, lines))
    return Embeddings(
        values=found.values,
        labels=found.labels,
        class_names=found.class_names,
        names=found.names,
        rejected=rejected,
    )
