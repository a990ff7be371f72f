"""What contestants share: what they are asked for, the same encoded bytes, torch's DataLoader, views on tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from shards.ground.cpus import available_cpus
from shards.sets import open_set

# Batches, each the two views of its samples, without end; and what closes the loader.
Opened = tuple[Iterator[Any], Callable[[], None]]
# Encoded bytes to the two views of a sample.
Views = Callable[[bytes], Any]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# No epoch ends while a loader is timed: its set is small, and an end would count more than it does in training.
NO_END = 10_000_000


@dataclass(frozen=True)
class Options:
    """What all contestants are asked for."""

    shards: str
    size: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A line of the registry."""

    opens: str
    """`module:function` in this package: takes `Options`, returns `Opened`; imported in the process that is timed."""
    views: str
    """What it is, what it gives, and where its views are not the recipe's."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions are kept with its figures."""
    needs: str = ""
    """Module without which it is left out."""
    install: str = "make bench-loaders"
    """What makes that module importable."""
    ours: bool = False


class EncodedPhotos:
    """The encoded bytes of each sample, as a folder of files would give them."""

    def __init__(self, shards: str) -> None:
        opened = open_set(shards)
        self._places = [
            (opened.shard_path(shard), int(record["offset"]), int(record["size"]))
            for shard in range(opened.num_shards)
            for record in opened.index(shard)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class PhotoViews(Dataset[Any]):
    """Two views of a sample by a function of its bytes."""

    def __init__(self, shards: str, views: Views) -> None:
        self._photos = EncodedPhotos(shards)
        self._views = views

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Any:
        return self._views(self._photos[index])


def open_data_loader(options: Options, views: Views, collate: Callable[[list[Any]], Any] | None = None) -> Opened:
    """Open torch's DataLoader with a worker per CPU, as its documentation recommends."""
    photos = PhotoViews(options.shards, views)
    loader = DataLoader(
        photos,
        batch_size=options.batch_size,
        sampler=RandomSampler(photos, replacement=True, num_samples=NO_END),
        drop_last=True,
        num_workers=available_cpus(),
        multiprocessing_context="fork",
        persistent_workers=True,
        collate_fn=collate,
    )
    return iter(loader), lambda: None


def endless(loader: Any) -> Iterator[Any]:
    """Yield epoch after epoch."""
    while True:
        yield from loader


def tensor_views(size: int) -> Callable[[torch.Tensor], tuple[Any, Any]]:
    """Both views by torchvision's v2 transforms of a uint8 tensor (3, H, W); blur as wide as in the recipe."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    return lambda image: (transform(image), transform(image))


def decoded(encoded: bytes) -> torch.Tensor:
    """Decode to uint8 (3, H, W) as torchvision does."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)


def written_beside(shards: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Return a set in a format of its own, written beside the shards by the first who asks; not part of any figure."""
    path = Path(f"{shards.rstrip('/')}.{suffix}")
    if not path.exists():
        draft = path.with_name(f"{path.name}.draft")
        write(draft)
        draft.rename(path)
    return path
