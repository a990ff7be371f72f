"""Map of embeddings: samples as points in a plane, with their pictures in one image, for the page to zoom into."""

import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from moco_fast.commands.place import data_of, place
from moco_fast.embedding.images import Origins
from moco_fast.encoders.open import open_encoder
from moco_fast.evaluation.base import Want
from moco_fast.evaluation.cache import FeatureCache, default_folder
from moco_fast.evaluation.features import Features
from moco_fast.evaluation.inputs import CachedFeatures, Subject
from moco_fast.evaluation.kmeans import kmeans
from moco_fast.report.neighbors import sample_pixels
from moco_fast.report.record import RunRecord
from shards.sets import ShardSet, open_set

__all__ = ["EmbeddingMap", "MapMethod", "draw_map", "principal_components"]

MapMethod = Literal["pca", "tsne"]

_MAX_POINTS = 2000
_SIDE = 48  # pixels of a picture
_MAX_GROUPS = 24  # that colors and shapes of the page tell apart
_CLUSTERS = 12  # where classes are unknown, or more than that
_BEFORE_TSNE = 50  # principal components
_PERPLEXITY = 30.0
_STEPS = 1 << 14  # steps of a coordinate: finer than any screen
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """Map for the page."""

    caption: str
    groups: list[tuple[str, int]]
    """What has a color and a shape, with its number of samples."""
    sprite: str
    """Pictures of all samples, row by row, as a data URL."""
    data: Markup
    """JSON that the page's script reads."""


def draw_map(
    record: RunRecord, *, device: torch.device, method: MapMethod, compute: bool, cache: Path | None = None
) -> EmbeddingMap:
    """Draw the map of a run's held-out samples, or of its training samples where there are none.

    Args:
        record: of the run.
        device: of the encoder.
        method: `pca`: the plane of the two largest principal components. `tsne`: neighbors stay neighbors (van der
            Maaten & Hinton 2008), while distances and places mean nothing.
        compute: compute features that the cache of `moco-fast eval` lacks.
        cache: its folder; None: the user's.

    Raises:
        ValueError: the run has no checkpoint or no images, or features are not there and are not to be computed.
        OSError: the cache's disk is full.
    """
    config = record.config
    shards = open_set(config.data.shards if config.eval.shards is None else config.eval.shards)
    features = _features(record, shards, device, compute=compute, cache=cache or default_folder())
    if len(features) < 2:
        raise ValueError(f"{shards.where} holds fewer than two samples")
    values = features.values.float().cpu()
    points, says = _points(values, method)
    groups, names, colors = _groups(values, features.labels.numpy(), shards.class_names)
    samples = features.index.numpy()
    sprite, columns = _sprite(
        sample_pixels(shards, samples, side=_SIDE, crop=config.eval.crop, data=config.data), samples
    )
    origins = Origins(shards)
    data = {
        "x": points[:, 0].tolist(),
        "y": points[:, 1].tolist(),
        "scale": _STEPS,
        "group": groups.tolist(),
        "sample": samples.tolist(),
        "key": [int(origins.keys(range(sample, sample + 1))[0]) for sample in samples.tolist()],
        "label": features.labels.tolist() if shards.class_names else [],
        "classes": list(shards.class_names),
        "columns": columns,
        "side": _SIDE,
    }
    of = "held-out" if config.eval.shards is not None else "training"
    shown = (
        f"all {len(samples):,}" if len(samples) == shards.num_samples else f"{len(samples):,} of {shards.num_samples:,}"
    )
    return EmbeddingMap(
        caption=f"{shown} {of} samples, by the encoder at step {record.last['step']:,.0f}; {says}. Colors: {colors}.",
        groups=names,
        sprite=sprite,
        # No text in it can end the script that it lies in.
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),  # noqa: S704 - JSON whose < is escaped
    )


def _features(record: RunRecord, shards: ShardSet, device: torch.device, *, compute: bool, cache: Path) -> Features:
    """Return features of length 1, of samples evenly spread over the set, from the cache if it has them."""
    opened = open_encoder(str(record.path))
    kind: Any = device.type
    with place(opened.config, device=kind, precision=None) as (where, _, precision):
        subject = Subject(
            encoder=opened.encoder.to(where),
            digest=opened.digest,
            sets={"shown": shards},
            size=opened.encoder.image_size,
            crop=opened.encoder.crop,
            data=replace(data_of(opened.config, where), batch_size=_BATCH),
            device=where,
            precision=precision,
        )
        source = CachedFeatures(subject=subject, cache=FeatureCache(cache))
        want = Want(split="shown", at_most=_MAX_POINTS, unit=True)
        if compute:
            source.prepare([want])
        try:
            return source.get(want)
        except LookupError:
            raise ValueError("its features have not been computed: `moco-fast report RUN --map` does it") from None


def principal_components(values: Tensor, num: int) -> tuple[Tensor, float]:
    """Project values onto their largest principal components.

    Args:
        values: (N, D) float.
        num: components, at most N and D.

    Returns:
        (N, num) float64, each column's largest value in size positive, and the share of the variance that is kept.
    """
    centered = values.double() - values.double().mean(dim=0)
    # Of the two products the smaller one has the same eigenvalues.
    if centered.shape[0] <= centered.shape[1]:
        squares, vectors = torch.linalg.eigh(centered @ centered.T)
        projected = vectors * squares.clamp(min=0).sqrt()
    else:
        squares, vectors = torch.linalg.eigh(centered.T @ centered)
        projected = centered @ vectors
    projected = projected.flip(dims=(1,))[:, :num]
    largest = projected.gather(0, projected.abs().argmax(dim=0, keepdim=True))
    kept = float(squares.clamp(min=0)[-num:].sum() / squares.clamp(min=0).sum().clamp(min=1e-30))
    return projected * torch.where(largest < 0, -1.0, 1.0), kept


def _points(values: Tensor, method: MapMethod) -> tuple[npt.NDArray[np.int64], str]:
    """Return (N, 2) places on the map, and in words what they mean."""
    if method == "tsne":
        from sklearn.manifold import TSNE

        small, _ = principal_components(values, min(_BEFORE_TSNE, *values.shape))
        perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
        start = "pca" if small.shape[1] > 1 else "random"
        drawn = TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(small.float().numpy())
        places = torch.from_numpy(drawn).double()
        says = "t-SNE: neighbors stay neighbors, while distances and places mean nothing"
    else:
        places, kept = principal_components(values, min(2, *values.shape))
        if places.shape[1] < 2:
            places = torch.cat([places, torch.zeros_like(places)], dim=1)
        says = f"the plane of their two largest principal components, with {kept:.0%} of the variance"
    low = places.min(dim=0).values
    # One scale for both axes, so that distances are what they are.
    extent = (places.max(dim=0).values - low).max().clamp(min=1e-12)
    return ((places - low) / extent * _STEPS).round().long().numpy(), says


def _groups(
    values: Tensor, labels: npt.NDArray[np.int64], class_names: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], list[tuple[str, int]], str]:
    """Return each sample's group, the groups' names and sizes, and in words what they are."""
    known = np.unique(labels[labels >= 0])
    if 1 < len(known) <= _MAX_GROUPS:
        found = {int(label): place for place, label in enumerate(known)}
        names = [class_names[label] if label < len(class_names) else f"class {label}" for label in found]
        has_unlabeled = bool((labels < 0).any())
        groups = np.array([found.get(int(label), len(names)) for label in labels])
        names = [*names, "no label"] if has_unlabeled else names
        says = "classes"
    else:
        num = min(_CLUSTERS, len(values))
        clusters = kmeans(values, k=num, seed=0, num_init=1, max_iter=50).assignment.numpy()
        # The largest first.
        order = np.argsort(-np.bincount(clusters, minlength=num), kind="stable")
        groups = np.argsort(order)[clusters]
        names = [f"cluster {number + 1}" for number in range(num)]
        says = f"{num} clusters that k-means finds among all their features"
        says += f", for there are {len(known):,} classes" if len(known) > 1 else ""
    counts = np.bincount(groups, minlength=len(names)).tolist()
    return groups, list(zip(names, counts, strict=True)), says


def _sprite(pixels: dict[int, npt.NDArray[np.uint8]], samples: npt.NDArray[np.int64]) -> tuple[str, int]:
    """Return one image with the pictures of all samples in rows, as a data URL, and how many are in a row."""
    columns = int(np.ceil(np.sqrt(len(samples))))
    rows = -(-len(samples) // columns)
    whole = np.zeros((rows * _SIDE, columns * _SIDE, 3), np.uint8)
    for number, sample in enumerate(samples.tolist()):
        top, left = (_SIDE * part for part in divmod(number, columns))
        whole[top : top + _SIDE, left : left + _SIDE] = pixels.get(sample, 0)  # a damaged one may be absent
    out = io.BytesIO()
    Image.fromarray(whole).save(out, "webp", quality=78, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}", columns
