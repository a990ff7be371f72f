"""Features of a set of samples: an encoder, run over shards."""

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from moco_fast import distributed
from moco_fast.config import Layer
from moco_fast.encoders.encoder import Encoder
from pipelines.batch import Batch
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader, suited_to
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["Features", "extract", "gather", "labeled_features", "spread"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N samples with what is known of each."""

    values: Tensor
    """(N, D) float32, on the device that computed them."""
    labels: Tensor
    """(N,) int64 on the host; -1 where there is none."""
    index: Tensor
    """(N,) int64 on the host: dense sample numbers."""

    def __len__(self) -> int:
        return len(self.index)


@torch.no_grad()
def extract(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    layer: Layer = "backbone",
    l2_normalize: bool = True,
    title: str | None = None,
) -> Features:
    """Compute the features of every sample that `batches` hands over.

    The encoder works in eval mode and gets each of its modules' modes back; autocast around the call is respected.

    Args:
        encoder: on `device`.
        batches: images (B, 3, H, W) uint8.
        device: where the features stay.
        layer: whose output the features are.
        l2_normalize: scale every feature vector to length 1.
        title: shows a progress bar with this title, if it takes longer than a few seconds.
    """
    values: list[Tensor] = []
    labels: list[Tensor] = []
    index: list[Tensor] = []
    with _eval_mode(encoder):
        for batch in _with_progress(batches, title):
            features = encoder.features(batch.views[0].to(device, non_blocking=True), layer).float()
            values.append(normalize(features) if l2_normalize else features)
            labels.append(batch.label)
            index.append(batch.index)
    dim = encoder.feature_dim if layer == "backbone" else encoder.dim
    return Features(
        values=torch.cat(values) if values else torch.empty(0, dim, device=device),
        labels=torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64),
        index=torch.cat(index) if index else torch.empty(0, dtype=torch.int64),
    )


def _with_progress(batches: Iterable[Batch], title: str | None) -> Iterable[Batch]:
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(batches, desc=title, disable=title is None, delay=3, mininterval=interval_s, leave=False, unit="batch")


def labeled_features(
    encoder: Encoder,
    shards: ShardSet,
    *,
    layer: Layer,
    size: int,
    crop: float,
    data: DataConfig,
    device: torch.device,
    world: World = World(),
    indices: np.ndarray | None = None,
    title: str | None = None,
) -> Features:
    """Compute this rank's share of the features, of length 1, of the labeled samples in a set of shards.

    Args:
        encoder: on `device`.
        shards: the set.
        layer: whose output the features are.
        size: height and width of the images in pixels.
        crop: side of the central square that is used, as a share of the image's shorter side.
        data: of the run: its batch size, backend and cache, and what is done about samples that cannot be read.
        device: where to compute and where the features stay.
        world: this process and how many share the samples.
        indices: dense sample numbers to take; all, if not given.
        title: of a progress bar, shown by the first rank only.
    """
    samples = np.arange(shards.num_samples) if indices is None else indices
    views = central_crop(size, side=crop)
    with open_loader(
        suited_to(data, shards), views, samples=samples, device=device, world=world, shards=shards
    ) as loader:
        features = extract(encoder, loader, device=device, layer=layer, title=title if world.rank == 0 else None)
    keep = features.labels >= 0
    return Features(values=features.values[keep.to(device)], labels=features.labels[keep], index=features.index[keep])


def gather(features: Features) -> Features:
    """Bring together the features of all ranks, in order of dense sample number; collective.

    Every rank receives the same; without other ranks only the order is settled.
    """
    values, labels, index = features.values, features.labels, features.index
    if distributed.world_size() > 1:
        labels, index = (_gather_rows(rows.to(values.device)).cpu() for rows in (labels, index))
        values = _gather_rows(values)
    order = index.argsort(stable=True)
    return Features(values=values[order.to(values.device)], labels=labels[order], index=index[order])


def spread(shards: ShardSet, at_most: int) -> np.ndarray | None:
    """Choose at most so many samples, evenly spread over a set: dense sample numbers, or None for all."""
    num_samples = shards.num_samples
    if num_samples <= at_most:
        return None
    return np.arange(at_most, dtype=np.int64) * num_samples // at_most


def _gather_rows(rows: Tensor) -> Tensor:
    """Concatenate (N_r, ...) of every rank r, whose lengths may differ, to (sum N_r, ...)."""
    sizes = distributed.all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = distributed.all_gather_rows(padded).unflatten(0, (len(sizes), max(sizes)))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
