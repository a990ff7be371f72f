"""SPDL: its pipeline of threads in a subprocess and its decoder, the views of pillow_authors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import spdl.io
import torch
from PIL import Image
from spdl.pipeline import PipelineBuilder, run_pipeline_in_subprocess

from loaders.base import EncodedPhotos, Opened, Options
from loaders.pillow_authors import pil_views
from shards.ground.cpus import available_cpus


@dataclass(frozen=True)
class Shuffled:
    """Encoded photos in a random order without end."""

    shards: str

    def __iter__(self) -> Iterator[bytes]:
        photos = EncodedPhotos(self.shards)
        order = np.random.default_rng(0)
        while True:
            for number in order.permutation(len(photos)):
                yield photos[number]


def open_batches(options: Options) -> Opened:
    """Run the views in a thread per CPU of one subprocess."""
    # The views are the threads' work; an operation of torch that starts more would only be in their way.
    torch.set_num_threads(1)
    transform = pil_views(options.size)

    def views(encoded: bytes) -> Any:
        pixels = spdl.io.load_image(encoded, filter_desc=spdl.io.get_video_filter_desc(pix_fmt="rgb24"))
        return transform(Image.fromarray(spdl.io.to_numpy(pixels)))

    def stack(samples: list[Any]) -> Any:
        return [torch.stack(view) for view in zip(*samples, strict=True)]

    config = (
        PipelineBuilder()
        .add_source(Shuffled(options.shards))
        .pipe(views, concurrency=available_cpus())
        .aggregate(options.batch_size, drop_last=True)
        .pipe(stack)
        .add_sink(3)
        .get_config()
    )
    batches = run_pipeline_in_subprocess(config, num_threads=available_cpus() + 1, mp_context="fork")
    return iter(batches), lambda: None
