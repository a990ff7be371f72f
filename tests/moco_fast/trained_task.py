"""A set that can be learned in seconds, and an encoder that learns it: for tests of tasks that train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.formats.base import digest_of
from moco_fast.evaluation.base import Task
from moco_fast.evaluation.front import Plan, evaluate
from moco_fast.evaluation.inputs import Subject
from moco_fast.evaluation.result import Result
from pipelines.config import DataConfig
from pipelines.world import World
from shards.sets import open_set
from tests.pipelines.shard_files import jpeg, write_shards

COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200), (200, 40, 200))
CPU = torch.device("cpu")


def colored(folder: Path, *, per_class: int, seed: int, shift: int = 0) -> Path:
    """Images of 16 pixels in the color of their class, or of the one `shift` further, with noise; classes in turn."""
    rng = np.random.default_rng(seed)
    labels = list(range(len(COLORS))) * per_class
    colors = [np.array(COLORS[(label + shift) % len(COLORS)]) for label in labels]
    images = [np.clip(color + rng.normal(0, 12, (16, 16, 3)), 0, 255) for color in colors]
    return write_shards(folder, [jpeg(image.astype(np.uint8)) for image in images], per_shard=20, labels=labels)


def tiny_encoder(seed: int = 0) -> Encoder:
    """A convolution with batch norm: features of 12 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        return Encoder(backbone, nn.Linear(12, 4), feature_dim=12, dim=4, image_size=16, crop=1.0).eval()


def subject_of(train: Path | str, test: Path | str, *, encoder: Encoder | None = None, **changes: Any) -> Subject:
    encoder = tiny_encoder() if encoder is None else encoder
    subject = Subject(
        encoder=encoder,
        digest=digest_of(encoder),
        sets={"train": open_set(str(train)), "test": open_set(str(test))},
        size=16,
        crop=1.0,
        data=DataConfig(shards="", batch_size=32, backend="dali", num_threads=1),
        device=CPU,
        world=World(),
    )
    return replace(subject, **changes)


def run(subject: Subject, cache: Path | str, task: Task, *, seeds: int = 1, every_steps: int = 500) -> Result:
    plan = Plan(
        subject=subject,
        name="tiny",
        tasks=[task.settled(None)],
        seeds=seeds,
        cache=Path(cache),
        save_every_steps=every_steps,
    )
    [result] = evaluate(plan)
    return result
