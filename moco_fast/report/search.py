"""Page of a search: queries and the images nearest to them, as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_fast.embedding.index import Index
from moco_fast.embedding.search import Answer, Hit
from moco_fast.report.pictures import Picture
from moco_fast.report.report import open_template
from moco_fast.report.rows import pictures_of, row_pictures
from shards.ground.files import write_whole
from shards.sets import ShardSet

__all__ = ["write_page"]


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
    asked = pictures_of(queries, range(queries.num_samples))
    shown, note = row_pictures(index, [hit.row for answer in found for hit in answer.hits])
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
