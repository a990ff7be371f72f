"""LitData: chunks of the same JPEGs by its `optimize`, decoded and augmented as by pillow_authors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata

from loaders.base import EncodedPhotos, Opened, Options, written_beside
from loaders.pillow_authors import pil_views
from shards.ground.cpus import available_cpus


def open_batches(options: Options) -> Opened:
    """Open a StreamingDataLoader with a worker per CPU; the set is gone through again and again, shuffled."""
    photos = EncodedPhotos(options.shards)

    def write(folder: Path) -> None:
        litdata.optimize(
            fn=lambda number: {"jpg": photos[number]},
            inputs=list(range(len(photos))),
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=1,
            start_method="fork",
            verbose=False,
        )

    path = written_beside(options.shards, "litdata", write)
    views = pil_views(options.size)
    endlessly = litdata.ParallelStreamingDataset(
        [litdata.StreamingDataset(str(path), shuffle=True, drop_last=True)],
        length=float("inf"),
        transform=lambda samples: views(samples[0]["jpg"]),
    )
    loader = litdata.StreamingDataLoader(
        endlessly, batch_size=options.batch_size, num_workers=available_cpus(), multiprocessing_context="fork"
    )

    def batches() -> Iterator[Any]:
        yield from loader

    return batches(), lambda: None
