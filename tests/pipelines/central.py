"""Central crops of a set, as evaluation opens them."""

from dataclasses import replace

import numpy as np
import torch

from pipelines.config import DataConfig, central_crop
from pipelines.loader import ListLoader, open_loader
from pipelines.world import World
from shards.sets import open_set


def open_central(
    shards,
    *,
    size: int,
    crop: float = 0.875,
    batch_size: int,
    samples: np.ndarray | None = None,
    device: torch.device = torch.device("cpu"),
    world: World = World(),
    data: DataConfig | None = None,
    **options,
) -> ListLoader:
    """All samples of a set, if none are named; `batch_size` is that of all ranks."""
    opened = open_set(shards)
    samples = np.arange(opened.num_samples) if samples is None else samples
    data = replace(data or DataConfig(shards=str(shards)), batch_size=batch_size, **{"backend": "dali"} | options)
    return open_loader(data, central_crop(size, side=crop), samples=samples, device=device, world=world, shards=opened)
