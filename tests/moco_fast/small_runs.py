"""A run small enough for a test that evaluates while it goes on."""

import dataclasses
from pathlib import Path
from typing import Any

from moco_fast.config import Config, ModelConfig
from moco_fast.presets import PRESETS

__all__ = ["small_run"]


def small_run(shards: Path, out: Path, *, steps: int, **run: Any) -> Config:
    """Return the demo's recipe for a tiny encoder and batches of 16 images of 32 pixels, on the CPU."""
    base = PRESETS["demo"][1]
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, shards=str(shards), batch_size=16, backend="dali", num_threads=1),
        views=dataclasses.replace(base.views, size=32),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=dataclasses.replace(base.method, queue_size=64),
        run=dataclasses.replace(base.run, device="cpu", precision="fp32", steps=steps, out=str(out), **run),
        log=dataclasses.replace(base.log, every_steps=1, trackers=()),
    )
