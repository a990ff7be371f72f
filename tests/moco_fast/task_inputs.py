"""Inputs of tasks that are features made up by a test, with images and an encoder that are not where they come from."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import Split, Want
from moco_fast.evaluation.features import Features
from moco_fast.evaluation.inputs import PerImage
from pipelines.batch import Batch
from pipelines.config import DataConfig
from pipelines.world import World


@dataclass
class MadeUp:
    """Features of two splits, the same for every layer unless `layers` has some of its own."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    seed: int = 0
    layers: dict[tuple[Split, str], Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    world: World = World()
    sets: dict[Split, npt.NDArray[np.int8]] = field(default_factory=dict)
    """Classes of the samples of each split where they have several."""
    more: dict[Split, tuple[Tensor, Tensor]] = field(default_factory=dict)
    names: dict[Split, tuple[str, ...]] = field(default_factory=dict)

    def _set(self, split: Split) -> tuple[Tensor, Tensor]:
        return {"train": self.train, "test": self.test, **self.more}[split]

    def class_names(self, split: Split) -> tuple[str, ...]:
        return self.names.get(split, tuple(f"class-{number}" for number in range(self.num_classes)))

    def label_counts(self, split: Split) -> npt.NDArray[np.int64]:
        labels = self._set(split)[1]
        return labels[labels >= 0].bincount(minlength=len(self.class_names(split))).numpy()

    def features(self, want: Want, *, labeled: bool = True) -> Features:
        values, labels = self._set(want.split)
        values = self.layers.get((want.split, want.layer), values)
        index = torch.arange(len(labels))
        if want.at_most is not None and want.at_most < len(labels):
            index = torch.arange(want.at_most) * len(labels) // want.at_most
        keep = index[labels[index] >= 0] if labeled else index
        found = values[keep]
        return Features(values=normalize(found) if want.unit else found, labels=labels[keep], index=keep)

    def label_sets(self, split: Split) -> npt.NDArray[np.int8] | None:
        return self.sets.get(split)

    size = 8
    data = DataConfig(shards="", num_threads=1)

    @cached_property
    def encoder(self) -> Encoder:
        dim = self.train[0].shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dim))
        return Encoder(backbone, nn.Identity(), feature_dim=dim, dim=dim, image_size=self.size).eval()

    def autocast(self) -> Any:
        return nullcontext()

    def per_image(self, made: PerImage) -> Features:
        labels = self.test[1]
        shape = (len(labels), 3, self.size, self.size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        index = torch.arange(len(labels))[: made.at_most]
        batch = Batch(views=(images[index],), index=index, label=labels[index])
        return Features(values=made.function(batch), labels=labels[index], index=index)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a task on features asks for {name}")


def blobs(num: int, *, dim: int = 8, num_classes: int = 4, seed: int = 0, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    """(num, dim) points around a center for each class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(1000))
    labels = torch.randint(num_classes, (num,), generator=generator)
    return centers[labels] + torch.randn(num, dim, generator=generator), labels
