"""mosaic streaming: MDS shards of the same JPEGs, decoded and augmented as by pillow_authors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from loaders.base import NO_END, EncodedPhotos, Opened, Options, written_beside
from loaders.pillow_authors import pil_views
from shards.ground.cpus import available_cpus


class MosaicPhotos(StreamingDataset):
    """Two views of each sample of an MDS."""

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(
            local=str(path),
            shuffle=True,
            batch_size=options.batch_size,
            epoch_size=NO_END // 100,
            sampling_method="balanced",
        )
        self._views = pil_views(options.size)

    def __getitem__(self, at: Any) -> Any:
        return self._views(super().__getitem__(at)["jpg"])


def open_batches(options: Options) -> Opened:
    """Open a StreamingDataLoader with a worker per CPU."""
    photos = EncodedPhotos(options.shards)

    def write(folder: Path) -> None:
        with MDSWriter(out=str(folder), columns={"jpg": "bytes"}) as writer:
            for number in range(len(photos)):
                writer.write({"jpg": photos[number]})

    clean_stale_shared_memory()
    streamed = MosaicPhotos(written_beside(options.shards, "mds", write), options)
    loader = StreamingDataLoader(
        streamed,
        batch_size=options.batch_size,
        num_workers=available_cpus(),
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
    )

    def batches() -> Iterator[Any]:
        yield from loader

    return batches(), clean_stale_shared_memory
