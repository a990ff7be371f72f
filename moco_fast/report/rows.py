"""Pictures of rows of written embeddings, from the images that they were made of."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moco_fast.embedding.images import Origins, pack_files
from moco_fast.embedding.index import Index, Row
from moco_fast.report.neighbors import sample_pictures
from moco_fast.report.pictures import Picture
from pipelines.config import DataConfig
from shards.sets import ShardSet, open_set

__all__ = ["pictures_of", "row_pictures"]

_SIDE = 192  # pixels


def row_pictures(index: Index, rows: Sequence[Row]) -> tuple[dict[int, Picture], str]:
    """Return pictures of rows by their numbers, as far as their images are still there, and what there is to say."""
    samples = {row.index: row.row for row in rows}
    if index.header["are_shards"]:
        try:
            shards = open_set(index.header["images"])
        except (ValueError, OSError) as error:
            return {}, str(error)
        if shards.manifest.identity != index.settings["images"]:
            return {}, f"{index.header['images']} holds other images than it did when they were embedded"
        pictures = pictures_of(shards, sorted(samples))
        return {samples[sample]: picture for sample, picture in pictures.items()}, ""
    files = {str(Path(source).absolute()): row.row for row in rows if (source := row.source)}
    there = sorted(path for path in files if Path(path).is_file())
    gone = len(files) - len(there)
    note = "1 image is not a file in its place" if gone == 1 else f"{gone} images are not files in their places"
    note = note if gone else ""
    if not there:
        return {}, note
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_files(there, Path(folder) / "hits")
        sources = Origins(packed).sources(range(packed.num_samples))
        pictures = pictures_of(packed, range(packed.num_samples))
        return {files[str(source)]: pictures[sample] for sample, source in enumerate(sources)}, note


def pictures_of(shards: ShardSet, samples: Sequence[int]) -> dict[int, Picture]:
    """Return the central squares of some samples of a set, by their numbers."""
    numbers = np.asarray(samples, dtype=np.int64)
    return sample_pictures(shards, numbers, side=_SIDE, crop=1.0, data=DataConfig(shards="", num_threads=1))
