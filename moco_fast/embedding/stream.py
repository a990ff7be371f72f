"""Stream of embeddings: samples in parts, computed batch by batch, each part handed over when it is complete.

Which samples are a part and a batch depends on the set and the encoder alone. So every sample is computed beside the
same others, and its vector is the same bit for bit, however many ranks share the parts and wherever a stopped
embedding goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.embedding.images import Origins
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.features import feature_batches
from pipelines.backends.registry import choose
from pipelines.batch import Batch
from pipelines.config import DataConfig, central_crop
from pipelines.loader import ListLoader, open_loader, suited_to
from pipelines.world import World
from shards.ground.arrays import Indices
from shards.sets import ShardSet

__all__ = ["Damaged", "Rows", "VectorType", "Vectors", "divide", "embed_parts"]

VectorType = Literal["float32", "float16"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PART_BYTES = 128 << 20  # of vectors: a rank holds one part that fills and one that is being written
_MOST_PARTS = 64  # of a small set, so that many ranks have something to do
_LOADER_SAMPLES = 1 << 22  # whose numbers are listed at once: 32 MiB


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """How images become vectors."""

    encoder: Encoder
    """On `device`."""
    size: int
    """Height and width of the images in pixels."""
    crop: float
    """Side of the central square, as a share of the shorter side."""
    layer: str = "backbone"
    """Whose output the vectors are (moco_fast.encoders.layers)."""
    normalize: bool = True
    """Scale every vector to length 1."""
    dtype: VectorType = "float32"
    batch_size: int = 256
    """Images that a rank computes at once."""
    data: DataConfig
    """Backend and cache of shards; which shards it names is of no matter."""
    device: torch.device
    precision: str = "fp32"
    """That the encoder computes in: fp32, tf32, bf16 or fp16."""
    world: World = World()

    def dim(self) -> int:
        """Return the length of a vector. Raises ValueError: the layer gives several of an image, or is not there."""
        [shape] = layer_shapes(self.encoder, (self.layer,), size=self.size).values()
        if len(shape) != 1:
            raise ValueError(
                f"--layer {self.layer} gives {shape[0]} vectors per image, and one is wanted: take backbone, head or a "
                "stage"
            )
        return shape[0]

    def decoder(self, shards: ShardSet) -> str:
        """Return what decodes the images of a set, and where: pixels differ between them by some levels."""
        backend = suited_to(self.data, shards).backend
        name, _ = choose(backend, device=self.device, size=self.size, kind=shards.kind)
        return f"{name} on {self.device.type}"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the encoder computes in the precision."""
        dtype = _HALF.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A sample that cannot be read, and so has no vector."""

    index: int
    """Dense sample number."""
    key: int
    source: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The samples of one part that can be read, in order of their numbers."""

    values: npt.NDArray[Any]
    """(n, D) float32 or float16."""
    index: Indices
    """(n,) dense sample numbers."""
    keys: Indices
    """(n,) planned positions in their set."""
    labels: Indices
    """(n,), -1 where there is none."""
    sources: list[str | None]
    """n; None where the shards do not say."""
    damaged: tuple[Damaged, ...]

    def __len__(self) -> int:
        return len(self.index)


def divide(num_samples: int, *, row_bytes: int, batch_size: int) -> list[range]:
    """Divide samples into parts of whole batches; only the last one may end with a short one."""
    wanted = min(_PART_BYTES // row_bytes, -(-num_samples // _MOST_PARTS))
    step = max(1, -(-wanted // batch_size)) * batch_size
    return [range(begin, min(begin + step, num_samples)) for begin in range(0, num_samples, step)]


def embed_parts(
    vectors: Vectors, shards: ShardSet, parts: Sequence[range], *, tick: Callable[[int], object] = lambda _: None
) -> Iterator[Rows]:
    """Compute the vectors of some parts of a set, part after part; a damaged sample is left out and said to be.

    Args:
        vectors: how they are computed.
        shards: the set.
        parts: some of what `divide` gave, in rising order.
        tick: is given the number of samples that are done, batch by batch.

    Raises:
        ValueError: vectors are not finite; 1,000 samples in a row are damaged.
    """
    dim, origins = vectors.dim(), Origins(shards)
    num_parts = max(1, _LOADER_SAMPLES // len(parts[0])) if parts else 1
    for begin in range(0, len(parts), num_parts):
        group = parts[begin : begin + num_parts]
        with _open(vectors, shards, group) as loader:
            batches = _computed(vectors, loader)
            for part in group:
                yield _collect(vectors, origins, part, batches, dim=dim, tick=tick)


def _open(vectors: Vectors, shards: ShardSet, parts: Sequence[range]) -> ListLoader:
    # A loader's batch is over all ranks, and every rank has the whole of ours.
    batch_size = vectors.batch_size * vectors.world.world_size
    data = replace(suited_to(vectors.data, shards), batch_size=batch_size, on_bad_sample="skip")
    samples = np.concatenate([np.arange(part.start, part.stop, dtype=np.int64) for part in parts])
    views = central_crop(vectors.size, side=vectors.crop)
    return open_loader(
        data, views, samples=samples, device=vectors.device, world=vectors.world, shards=shards, divided=False
    )


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """Vectors of a batch, on their way to the host."""

    values: Tensor
    index: Tensor
    labels: Tensor
    replaced: tuple[str, ...]
    done: "torch.cuda.Event | None"

    def waited(self) -> "_Computed":
        if self.done is not None:
            self.done.synchronize()
        return self


def _computed(vectors: Vectors, loader: ListLoader) -> Iterator[_Computed]:
    """Give batches on the host, each while the device already works on the next one."""
    before: _Computed | None = None
    dtype = getattr(torch, vectors.dtype)
    batches = feature_batches(vectors.encoder, loader, device=vectors.device, layers=(vectors.layer,))
    while (found := _next_of(batches, vectors)) is not None:
        features, batch = found
        values = features[vectors.layer]
        values = (normalize(values) if vectors.normalize else values).to(dtype)
        done: torch.cuda.Event | None = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)  # Into pinned memory.
            done = torch.cuda.Event()
            done.record()
        current = _Computed(values=values, index=batch.index, labels=batch.label, replaced=loader.replaced, done=done)
        if before is not None:
            yield before.waited()
        before = current
    if before is not None:
        yield before.waited()


def _next_of(
    batches: Iterator[tuple[dict[str, Tensor], Batch]], vectors: Vectors
) -> tuple[dict[str, Tensor], Batch] | None:
    # Around each step and not around the loop: a generator's context would reach its consumer.
    with vectors.autocast():
        return next(batches, None)


def _collect(
    vectors: Vectors,
    origins: Origins,
    part: range,
    batches: Iterator[_Computed],
    *,
    dim: int,
    tick: Callable[[int], object],
) -> Rows:
    """Bring together the batches of a part."""
    values = np.empty((len(part), dim), dtype=vectors.dtype)
    labels = np.empty(len(part), dtype=np.int64)
    is_good = np.empty(len(part), dtype=bool)
    reasons: dict[int, str] = {}
    row = 0
    while row < len(part):
        found = next(batches)
        rows = slice(row, row + len(found.index))
        asked = np.arange(part.start + rows.start, part.start + rows.stop)
        values[rows], labels[rows] = found.values.numpy(), found.labels.numpy()
        is_good[rows] = found.index.numpy() == asked
        reasons |= {sample: _reason(found.replaced, sample) for sample in asked[~is_good[rows]].tolist()}
        tick(len(asked))
        row = rows.stop
    _refuse_infinite(values[is_good], vectors)
    index = np.arange(part.start, part.stop)
    keys, sources = origins.keys(part), origins.sources(part)
    damaged = tuple(
        Damaged(
            index=sample,
            key=int(keys[sample - part.start]),
            source=sources[sample - part.start],
            reason=reason,
        )
        for sample, reason in reasons.items()
    )
    return Rows(
        values=values[is_good] if damaged else values,
        index=index[is_good],
        keys=keys[is_good],
        labels=labels[is_good],
        sources=[source for source, good in zip(sources, is_good.tolist(), strict=True) if good],
        damaged=damaged,
    )


def _reason(replaced: Sequence[str], sample: int) -> str:
    """Find what was wrong with a sample among the reasons of its batch, each of which names its own."""
    return next((reason for reason in replaced if f": sample {sample} (key " in reason), "it cannot be decoded")


def _refuse_infinite(values: npt.NDArray[Any], vectors: Vectors) -> None:
    if np.isfinite(values).all():
        return
    if vectors.dtype == "float16" and not vectors.normalize:
        raise ValueError(
            "some vectors are not finite in float16, which ends at 65,504: take --normalize or --dtype float32; if "
            "they are not finite then either, the encoder has diverged"
        )
    raise ValueError("the encoder's output is not finite: it has diverged, take an earlier checkpoint")
