"""Features of a set of samples: an encoder, run over shards."""

import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.layers import layer_features, layer_shapes
from pipelines.batch import Batch
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader, suited_to
from pipelines.world import World
from shards.sets import ShardSet

__all__ = [
    "Features",
    "eval_mode",
    "evenly",
    "extract",
    "extract_layers",
    "feature_batches",
    "gather",
    "near",
    "rows_at_once",
    "set_features",
    "spread",
    "with_progress",
]


_ROWS = 1 << 16  # features that are brought to the device at once: 512 MiB of 2,048 numbers


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N samples with what is known of each."""

    values: Tensor
    """(N, D) float32 (patches: (N, P, D)), on the device that computed them, or on the host if from a file."""
    labels: Tensor
    """(N,) int64 on the host; -1 where there is none."""
    index: Tensor
    """(N,) int64 on the host: dense sample numbers."""

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, chosen: Tensor) -> "Features":
        """Return some of the samples: (M,) row numbers or (N,) bool, on the host."""
        values = self.values[chosen.to(self.values.device)]
        return Features(values=values, labels=self.labels[chosen], index=self.index[chosen])


@torch.no_grad()
def feature_batches(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    layers: Sequence[str],
    title: str | None = None,
) -> Iterator[tuple[dict[str, Tensor], Batch]]:
    """Compute the features of several layers in one pass, batch by batch, each with the batch that they are of.

    The encoder works in eval mode and gets each of its modules' modes back; autocast around the call is respected.

    Args:
        encoder: on `device`.
        batches: images (B, 3, H, W) uint8.
        device: where the features stay.
        layers: names of layers (moco_fast.encoders.layers).
        title: shows a progress bar with this title, if it takes longer than a few seconds.
    """
    with eval_mode(encoder):
        for batch in with_progress(batches, title):
            found = layer_features(encoder, batch.views[0].to(device, non_blocking=True), layers)
            yield {layer: values.float() for layer, values in found.items()}, batch


def extract(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    layer: str = "backbone",
    l2_normalize: bool = True,
    title: str | None = None,
) -> Features:
    """Compute the features of every sample that `batches` hands over, as `feature_batches` does.

    Args:
        encoder: on `device`.
        batches: images (B, 3, H, W) uint8.
        device: where the features stay.
        layer: whose output the features are.
        l2_normalize: scale every feature vector to length 1.
        title: of a progress bar.
    """
    [found] = extract_layers(encoder, batches, device=device, layers=(layer,), title=title).values()
    return replace(found, values=normalize(found.values)) if l2_normalize else found


def extract_layers(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    layers: Sequence[str],
    title: str | None = None,
) -> dict[str, Features]:
    """Compute the features of several layers in one pass, by layer, not of length 1; arguments as `feature_batches`."""
    values: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    labels = [torch.empty(0, dtype=torch.int64)]
    index = [torch.empty(0, dtype=torch.int64)]
    for features, batch in feature_batches(encoder, batches, device=device, layers=layers, title=title):
        for layer, found in features.items():
            values[layer].append(found)
        labels.append(batch.label)
        index.append(batch.index)
    if len(index) == 1:
        shapes = layer_shapes(encoder, layers, size=encoder.image_size)
        values = {layer: [torch.empty(0, *shape, device=device)] for layer, shape in shapes.items()}
    return {
        layer: Features(values=torch.cat(parts), labels=torch.cat(labels), index=torch.cat(index))
        for layer, parts in values.items()
    }


def with_progress(batches: Iterable[Batch], title: str | None) -> Iterable[Batch]:
    """Show a progress bar, if there is a title and batches take longer than a few seconds."""
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(batches, desc=title, disable=title is None, delay=3, mininterval=interval_s, leave=False, unit="batch")


def set_features(
    encoder: Encoder,
    shards: ShardSet,
    *,
    layer: str,
    size: int,
    crop: float,
    data: DataConfig,
    device: torch.device,
    world: World = World(),
    indices: np.ndarray | None = None,
    title: str | None = None,
) -> Features:
    """Compute this rank's share of the features, of length 1, of the samples in a set of shards.

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
        return extract(encoder, loader, device=device, layer=layer, title=title if world.rank == 0 else None)


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


def near(values: Tensor, device: torch.device) -> Tensor:
    """Return features on the device; on the host where they would fill more than half of what the device has left."""
    if device.type == "cuda" and values.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return values
    return values.to(device)


def rows_at_once(values: Tensor, device: torch.device, *, dim: int = 0) -> int:
    """Return how many rows of features to compute with at once: all that are on the device, or a part to bring there.

    Args:
        values: as `near` returned them.
        device: where to compute.
        dim: that counts the rows.
    """
    return max(values.shape[dim], 1) if values.device == device else _ROWS


def spread(shards: ShardSet, at_most: int) -> np.ndarray | None:
    """Choose at most so many samples, evenly spread over a set: dense sample numbers, or None for all."""
    num_samples = shards.num_samples
    return None if num_samples <= at_most else evenly(num_samples, at_most)


def evenly(num_rows: int, num_chosen: int) -> np.ndarray:
    """Choose row numbers that are evenly spread over all."""
    return np.arange(num_chosen, dtype=np.int64) * num_rows // num_chosen


def _gather_rows(rows: Tensor) -> Tensor:
    """Concatenate (N_r, ...) of every rank r, whose lengths may differ, to (sum N_r, ...)."""
    sizes = distributed.all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = distributed.all_gather_rows(padded).unflatten(0, (len(sizes), max(sizes)))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Put a model into eval mode for a while; each of its modules gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
