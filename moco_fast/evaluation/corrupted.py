"""Corrupted images as batches: those of a set, corrupted on the way, or those in the folders of ImageNet-C."""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco_fast.evaluation.corrupting import Workers, corrupt_images, read_images
from moco_fast.evaluation.corruptions import Corruption
from pipelines.batch import Batch
from pipelines.world import World
from shards.ground.digests import digest

__all__ = ["CorruptedFolder", "FolderImages", "corrupt_batch"]

_ENDINGS = {".jpg", ".jpeg", ".png"}


def corrupt_batch(corruption: Corruption, batch: Batch, workers: Workers) -> Tensor:
    """Return the first views of a batch, corrupted: (B, 3, S, S) uint8, channels_last, on their device."""
    [images, *_] = batch.views
    rows = images.permute(0, 2, 3, 1).cpu().numpy()
    return _as_views(workers.run(corrupt_images, corruption, rows, batch.index.tolist()), images.device)


def _as_views(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class CorruptedFolder:
    """A folder with images as KIND/SEVERITY/CLASS/IMAGE, such as ImageNet-C; kinds may be one folder deeper.

    Attributes:
        path: the folder.
        class_names: of the labels.
    """

    path: Path
    class_names: Sequence[str]

    def classes(self, kind: str, severity: int) -> list[tuple[Path, int]]:
        """Return the folders of classes of a kind at a severity, with their labels.

        Raises:
            ValueError: there are none, or some that are not known.
        """
        place = f"{kind}/{severity}"
        places = (self.path / place, *sorted(self.path.glob(f"*/{place}")))
        folder = next((each for each in places if each.is_dir()), None)
        if folder is None:
            raise ValueError(
                f"--corrupted {self.path} has no folder {place}: give KIND/SEVERITY/CLASS/IMAGE, or leave kinds "
                "and severities out with --corruptions and --severities"
            )
        labels = {name: label for label, name in enumerate(self.class_names)}
        found = sorted(each for each in folder.iterdir() if each.is_dir())
        if odd := [each.name for each in found if each.name not in labels]:
            raise ValueError(
                f"{folder} has a class {odd[0]!r} that the test set lacks: folders must have the names of classes"
            )
        if not found:
            raise ValueError(f"{folder} holds no folders of classes: give KIND/SEVERITY/CLASS/IMAGE")
        return [(each, labels[each.name]) for each in found]

    def images(self, kind: str, severity: int, workers: Workers) -> "FolderImages":
        """Return the images of a kind at a severity. Raises ValueError: there are none; see `classes`."""
        classes = self.classes(kind, severity)
        files = [
            (path, label)
            for folder, label in classes
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in _ENDINGS
        ]
        if not files:
            raise ValueError(f"{classes[0][0].parent} holds no images in its folders of classes: restore them")
        return FolderImages(folder=classes[0][0].parent, files=files, workers=workers)


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """Images of one folder with their labels; see moco_fast.evaluation.inputs.Images."""

    folder: Path
    files: Sequence[tuple[Path, int]]
    workers: Workers

    @property
    def digest(self) -> str:
        """Of their names, sizes and times of change."""
        stats = ((path, label, path.stat()) for path, label in self.files)
        known = [
            (str(path.relative_to(self.folder)), label, each.st_size, each.st_mtime_ns) for path, label, each in stats
        ]
        return digest(json.dumps(known).encode())

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return len(self.files)

    @contextmanager
    def loader(
        self, samples: np.ndarray, *, size: int, batch_size: int, device: torch.device, world: World
    ) -> Generator["_FolderBatches"]:
        """Open this rank's part of some of them."""
        begin, end = (len(samples) * rank // world.world_size for rank in (world.rank, world.rank + 1))
        yield _FolderBatches(self, samples[begin:end], size, batch_size, device)


@dataclass(frozen=True)
class _FolderBatches:
    images: FolderImages
    samples: np.ndarray
    size: int
    batch_size: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self.samples), self.batch_size):
            numbers = self.samples[begin : begin + self.batch_size]
            chosen = [self.images.files[number] for number in numbers]
            rows = self.images.workers.run(read_images, self.size, [path for path, _ in chosen])
            yield Batch(
                views=(_as_views(rows, self.device),),
                index=torch.from_numpy(numbers),
                label=torch.tensor([label for _, label in chosen], dtype=torch.int64),
            )
