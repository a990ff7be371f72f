"""webdataset on the shards as they are, decoded and augmented as by pillow_authors."""

from collections.abc import Iterator
from typing import Any

import webdataset as wds

from loaders.base import Opened, Options
from loaders.pillow_authors import pil_views
from shards.ground.cpus import available_cpus
from shards.sets import open_set


def open_batches(options: Options) -> Opened:
    """Open a WebLoader on shards drawn with replacement, as its documentation recommends for training."""
    opened = open_set(options.shards)
    views = pil_views(options.size)
    tars = [str(opened.shard_path(shard)) for shard in range(opened.num_shards)]
    photos = wds.WebDataset(tars, resampled=True, shardshuffle=False, empty_check=False).shuffle(500)
    pairs = photos.to_tuple("jpg").map(lambda sample: views(sample[0]))
    batched = pairs.batched(options.batch_size, partial=False)
    loader = wds.WebLoader(batched, batch_size=None, num_workers=available_cpus(), multiprocessing_context="fork")

    def batches() -> Iterator[Any]:
        yield from loader

    return batches(), lambda: None
