"""Inputs of tasks that are features made up by a test."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.evaluation.base import Split, Want
from moco_fast.evaluation.features import Features
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

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a task on features asks for {name}")


def blobs(num: int, *, dim: int = 8, num_classes: int = 4, seed: int = 0, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    """(num, dim) points around a center for each class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(1000))
    labels = torch.randint(num_classes, (num,), generator=generator)
    return centers[labels] + torch.randn(num, dim, generator=generator), labels
