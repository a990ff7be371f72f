"""Our backends, as `open_loader` opens them for a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loaders.base import Opened, Options, endless
from pipelines.config import Backend, DataConfig, ViewsConfig
from pipelines.loader import open_loader
from shards.ground.progress import ProgressBars


def _open(options: Options, views: ViewsConfig, backend: Backend, shards: str) -> Opened:
    data = DataConfig(shards=shards, batch_size=options.batch_size, backend=backend)
    loader = open_loader(data, views, seed=0, device=torch.device("cpu"))

    def batches() -> Iterator[Any]:
        for batch in endless(loader):
            yield batch.views

    return batches(), loader.close


def open_torch(options: Options) -> Opened:
    """Open the torch backend."""
    return _open(options, ViewsConfig(size=options.size), "torch", options.shards)


def open_linear(options: Options) -> Opened:
    """Open the torch backend with linear colors."""
    return _open(options, ViewsConfig(size=options.size, color="linear"), "torch", options.shards)


def open_dali(options: Options) -> Opened:
    """Open the DALI backend."""
    return _open(options, ViewsConfig(size=options.size), "dali", options.shards)


def open_ffcv(options: Options) -> Opened:
    """Open the FFCV backend on a .beton beside the shards."""
    from shards.tools.beton import write_beton

    beton = f"{options.shards.rstrip('/')}.beton"
    if not Path(beton).exists():
        write_beton(options.shards, beton, workers=1, progress=ProgressBars(enabled=False))
    return _open(options, ViewsConfig(size=options.size), "ffcv", beton)
