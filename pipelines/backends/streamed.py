"""WebDataset tars without an index, streamed member after member by the webdataset library: to start at once.

What an index gives is missing here: shards are drawn with replacement and samples shuffled in a buffer, so an epoch is
a number of samples, not each of them once; a resumed run goes on with other samples; sample numbers are unknown; bytes
have no checksum. `make-shards index` gives all of that.

Members are split into samples, never unpickled; only local files are opened, never a `pipe:`.
"""

import io
import multiprocessing
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.shardlists import ResampledShards
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.backends.base import Made
from pipelines.backends.pixels import decode, render
from pipelines.plan.draw import Draw
from pipelines.reading.reader import DamagedSampleError
from shards.ground.arrays import Pixels
from shards.images.jpeg import JpegError, is_jpeg, parse_jpeg
from shards.sets.record import RECORD, Flag

__all__ = ["StreamPlace", "StreamPlan", "StreamSpec", "StreamedViews"]

_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"})
_BUFFER = 1000
# name of the sample, encoded image, label
_Sample = tuple[str, bytes, int]
# labels, views, what was wrong with each sample that was left out
_MadeBatch = tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What stands for the order of samples where there is none."""

    tars: tuple[str, ...]
    num_samples: int
    """Samples per epoch, as the user says."""
    batch_size: int
    """Samples per global step."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(
                f"data.stream_samples is {self.num_samples}: it must hold at least a batch of {self.batch_size}"
            )

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        return self.num_samples // self.batch_size


@dataclass(frozen=True, kw_only=True)
class StreamPlace:
    """Where a stream begins; another place gives other samples, the same place the same ones."""

    seed: int
    epoch: int
    step: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What the worker processes need to know."""

    plan: StreamPlan
    draw: Draw
    """Gives the views' tables from (epoch, numbers, records)."""
    sizes: tuple[int, ...]
    """Height and width of each view."""
    skip: bool
    """Leave out images that cannot be decoded, instead of ending."""
    num_samples: int
    """Of a batch of one rank."""


class StreamedViews:
    """Views of what the tars hold, without end, made by a DataLoader's worker processes.

    Args:
        spec: what to do.
        place: where to begin.
        device: where the views are wanted.
        num_workers: processes.
        prefetch: batches that each of them keeps ready.
    """

    def __init__(
        self, spec: StreamSpec, place: StreamPlace, *, device: torch.device, num_workers: int, prefetch: int
    ) -> None:
        self._device = device
        self._batches: Iterator[_MadeBatch] | None = iter(
            DataLoader(
                _Batches(spec, place),
                batch_size=None,
                num_workers=num_workers,
                prefetch_factor=prefetch,
                multiprocessing_context=_processes(),
                worker_init_fn=_start_worker,
                pin_memory=device.type == "cuda",
            )
        )

    def get(self) -> Made:
        """Wait for the next batch. Raises DamagedSampleError, or what else went wrong in a worker."""
        assert self._batches is not None, "closed"
        labels, views, left_out = next(self._batches)
        if self._device.type != "cpu":
            views = tuple(view.to(self._device, non_blocking=True) for view in views)
        return Made(
            samples=np.full(len(labels), -1, dtype=np.int64), labels=labels.numpy(), views=views, replaced=left_out
        )

    def close(self) -> None:
        """End the worker processes."""
        # A DataLoader's processes end with its iterator.
        self._batches = None


def _processes() -> BaseContext:
    # Not forks of this process, with its threads and its CUDA, but of one that has imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(_number: int) -> None:
    # Ctrl-C reaches the whole group of processes: the loader decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)


class _Batches(IterableDataset[_MadeBatch]):
    """A rank's batches: worker w of n makes every n-th of them."""

    def __init__(self, spec: StreamSpec, place: StreamPlace) -> None:
        self._spec = spec
        self._place = place

    def __iter__(self) -> Iterator[_MadeBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self._samples(worker)
        place, spec = self._place, self._spec
        number = worker
        while True:
            # Any number that no other sample of the run has: its random numbers follow from it.
            first = (place.step + number) * spec.plan.batch_size + place.rank * spec.num_samples
            yield self._batch(samples, np.arange(first, first + spec.num_samples))
            number += num_workers

    def _samples(self, worker: int) -> Iterator[_Sample]:
        place = self._place
        # A string, for numbers would be added up: (seed 1, worker 0) must not be (seed 0, worker 1).
        seed = random.Random(f"{place.seed} {place.epoch} {place.step} {place.rank} {worker}").getrandbits(63)  # noqa: S311 - a shuffle
        urls = ResampledShards(list(self._spec.plan.tars), seed=seed, worker_seed=lambda: 0, deterministic=True)
        rng = random.Random(seed)  # noqa: S311 - a shuffle
        return iter(shuffle(_BUFFER, initial=_BUFFER // 2, rng=rng)(self._read(iter(urls))))

    def _read(self, urls: Iterator[dict[str, Any]]) -> Iterator[_Sample]:
        num_barren = 0
        for url in urls:
            num_barren += 1
            with Path(url["url"]).open("rb") as stream:
                try:
                    for fields in group_by_keys(tar_file_expander([{**url, "stream": stream}])):
                        sample = _sample_of(fields)
                        if sample is not None:
                            num_barren = 0
                            yield sample
                except Exception as error:
                    # tarfile raises whatever the bytes make it run into.
                    what = f"{url['url']} cannot be read as a tar: {type(error).__name__}: {error.args[0]}"
                    raise DamagedSampleError(what) from None
            if num_barren > 10 * len(self._spec.plan.tars):
                raise ValueError(f"{Path(url['url']).parent} has tars, but none of their members is an image")

    def _batch(self, samples: Iterator[_Sample], numbers: npt.NDArray[np.int64]) -> _MadeBatch:
        spec = self._spec
        labels = np.empty(len(numbers), dtype=np.int64)
        views = [np.empty((len(numbers), size, size, 3), dtype=np.uint8) for size in spec.sizes]
        left_out: list[str] = []
        for row in range(len(numbers)):
            image, labels[row] = self._next_good(samples, left_out)
            tables = spec.draw(self._place.epoch, numbers[row : row + 1], _record(image))
            for out, table in zip(views, tables, strict=True):
                render(image, table, 0, out[row])
        channels_last = tuple(torch.from_numpy(view).permute(0, 3, 1, 2) for view in views)
        return torch.from_numpy(labels), channels_last, tuple(left_out)

    def _next_good(self, samples: Iterator[_Sample], left_out: list[str]) -> tuple[Pixels, int]:
        for name, encoded, label in samples:
            try:
                return _decode_upright(encoded), label
            except ValueError as error:
                if not self._spec.skip:
                    raise DamagedSampleError(f"{name}: {error}; --data.on-bad-sample skip leaves such out") from None
                left_out.append(f"{name}: {error}")
        raise AssertionError("the samples have no end")


def _sample_of(fields: dict[str, Any]) -> _Sample | None:
    """The image among a sample's members; None where there is none."""
    for name, data in fields.items():
        # webdataset ends a key at its first dot: what follows may hold more than the suffix.
        if name.rpartition(".")[2] in _SUFFIXES:
            label = fields.get("cls", b"")
            return f"{fields['__url__']}: {fields['__key__']}", data, int(label) if label.strip().isdigit() else -1
    return None


def _decode_upright(encoded: bytes) -> Pixels:
    """(H, W, 3) RGB as it is to be looked at. Raises ValueError where nothing can read it."""
    try:
        turned = is_jpeg(encoded) and parse_jpeg(encoded).orientation != 1
    except JpegError as error:
        raise ValueError(f"is a JPEG that {error}") from None
    if not turned:
        return decode(np.frombuffer(encoded, dtype=np.uint8))
    try:
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None


def _record(image: Pixels) -> npt.NDArray[np.void]:
    """What an index would say of an image, (1,) of RECORD."""
    record = np.zeros(1, dtype=RECORD)
    record["height"], record["width"] = image.shape[:2]
    record["mean_rgb"] = np.rint(image.reshape(-1, 3).mean(axis=0))
    record["flags"] = Flag.HAS_MEAN_RGB
    return record
