"""DALI's own operators, in their usual order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from loaders.base import EncodedPhotos, Opened, Options
from shards.ground.cpus import available_cpus


def _view(images: Any, size: int) -> Any:
    out = fn.random_resized_crop(images, size=(size, size), random_area=(0.2, 1.0), antialias=True)
    if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
        out = fn.color_twist(
            out,
            brightness=fn.random.uniform(range=(0.6, 1.4)),
            contrast=fn.random.uniform(range=(0.6, 1.4)),
            saturation=fn.random.uniform(range=(0.6, 1.4)),
            hue=fn.random.uniform(range=(-36.0, 36.0)),
        )
    if fn.random.coin_flip(probability=0.2, dtype=types.BOOL):
        out = fn.hsv(out, saturation=0.0)
    if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
        out = fn.gaussian_blur(out, sigma=fn.random.uniform(range=(0.1, 2.0)))
    return fn.flip(out, horizontal=fn.random.coin_flip())


def open_batches(options: Options) -> Opened:
    """Build and run the pipeline."""
    photos = EncodedPhotos(options.shards)
    order = np.random.default_rng(0)

    def encoded() -> list[np.ndarray]:
        return [np.frombuffer(photos[i], np.uint8) for i in order.integers(0, len(photos), options.batch_size)]

    @pipeline_def(enable_conditionals=True)
    def both() -> Any:
        images = fn.decoders.image(fn.external_source(encoded, batch=True, dtype=types.UINT8, ndim=1))
        return tuple(_view(images, options.size) for _ in range(2))

    pipe = both(
        batch_size=options.batch_size, num_threads=available_cpus(), device_id=None, prefetch_queue_depth=2, seed=0
    )
    pipe.build()

    def batches() -> Iterator[Any]:
        while True:
            yield pipe.run()

    return batches(), lambda: None
