"""Page of a search: queries and the images nearest to them, as pictures."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco_fast.embedding.images import Origins, pack_files
from moco_fast.embedding.index import Index
from moco_fast.embedding.search import Answer, Hit
from moco_fast.evaluation.cache import data_digest
from moco_fast.report.neighbors import sample_pictures
from moco_fast.report.pictures import Picture
from moco_fast.report.report import open_template
from pipelines.config import DataConfig
from shards.ground.files import write_whole
from shards.sets import ShardSet, open_set

__all__ = ["write_page"]

_SIDE = 192  # pixels


@dataclass(frozen=True, kw_only=True)
class _Shown:
    hit: Hit
    picture: Picture | None


def write_page(out: Path, index: Index, queries: ShardSet, found: Sequence[Answer]) -> None:
    """Write a page that needs nothing else.

    A picture that cannot be shown, since its image is no longer where it was, is a blank with its name.

    Args:
        out: file to write.
        index: that was searched.
        queries: packed, in the order of the answers.
        found: an answer to each query.
    """
    asked = _pictures(queries, range(queries.num_samples))
    shown, note = _of_hits(index, [hit for answer in found for hit in answer.hits])
    page = open_template("search.html").render(
        index=index,
        note=note,
        answers=[
            {
                "query": answer.query,
                "picture": asked[number],
                "hits": [_Shown(hit=hit, picture=shown.get(hit.row.row)) for hit in answer.hits],
            }
            for number, answer in enumerate(found)
        ],
    )
    write_whole(out, page, durable=False)


def _of_hits(index: Index, hits: Sequence[Hit]) -> tuple[dict[int, Picture], str]:
    """Return pictures of rows, as far as their images are still there, and what is to be said about it."""
    samples = {hit.row.index: hit.row.row for hit in hits}
    if index.header["are_shards"]:
        try:
            shards = open_set(index.header["images"])
        except (ValueError, OSError) as error:
            return {}, str(error)
        if data_digest(shards) != index.settings["images"]:
            return {}, f"{index.header['images']} holds other images than it did when they were embedded"
        pictures = _pictures(shards, sorted(samples))
        return {samples[sample]: picture for sample, picture in pictures.items()}, ""
    files = {str(Path(source).absolute()): hit.row.row for hit in hits if (source := hit.row.source)}
    there = sorted(path for path in files if Path(path).is_file())
    gone = len(files) - len(there)
    note = "1 image is no longer in its place" if gone == 1 else f"{gone} images are no longer in their place"
    note = note if gone else ""
    if not there:
        return {}, note
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_files(there, Path(folder) / "hits")
        sources = Origins(packed).sources(range(packed.num_samples))
        pictures = _pictures(packed, range(packed.num_samples))
        return {files[str(source)]: pictures[sample] for sample, source in enumerate(sources)}, note


def _pictures(shards: ShardSet, samples: Sequence[int]) -> dict[int, Picture]:
    numbers = np.asarray(samples, dtype=np.int64)
    return sample_pictures(shards, numbers, side=_SIDE, crop=1.0, data=DataConfig(shards="", num_threads=1))
