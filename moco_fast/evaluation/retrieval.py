"""Retrieval: how early the relevant samples of a database come when it is sorted by similarity to a query."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from moco_fast.embedding.images import Origins
from moco_fast.evaluation.features import rows_at_once
from shards.sets import ShardSet

__all__ = ["OfPairs", "Rankings", "Relevance", "SameLabel", "match", "rank", "read_pairs"]

_CHUNK_ELEMENTS = 1 << 24  # similarities held at once: 64 MiB of float32, and twice as much for their order


class Relevance(Protocol):
    """Which samples of a database are relevant to a query."""

    def of(self, queries: range) -> tuple[Tensor, Tensor | None]:
        """Return, on the device, what is relevant, and what does not count at all (None: all counts): (Q, N) bool."""
        ...


@dataclass(frozen=True, kw_only=True)
class SameLabel:
    """Relevant are samples of the query's class."""

    queries: Tensor
    """(Q,) int64."""
    database: Tensor
    """(N,) int64, on the device."""
    itself: bool
    """Whether the queries are the database: then a query is not asked to find itself."""

    def of(self, queries: range) -> tuple[Tensor, Tensor | None]:
        """Compare labels; see Relevance."""
        rows = torch.tensor(queries, device=self.database.device)
        relevant = self.queries.to(rows.device)[rows][:, None] == self.database
        if not self.itself:
            return relevant, None
        left_out = rows[:, None] == torch.arange(len(self.database), device=rows.device)
        return relevant & ~left_out, left_out


@dataclass(frozen=True, kw_only=True)
class OfPairs:
    """Relevant is what a file of pairs says."""

    relevant: Sequence[Sequence[int]]
    """For each query, rows of the database."""
    junk: Sequence[Sequence[int]]
    """For each query, rows that do not count, wherever they come."""
    num_database: int
    device: torch.device

    def of(self, queries: range) -> tuple[Tensor, Tensor | None]:
        """Mark the rows; see Relevance."""
        junk = self._marked(self.junk, queries)
        return self._marked(self.relevant, queries) & ~junk, junk

    def _marked(self, rows: Sequence[Sequence[int]], queries: range) -> Tensor:
        marked = torch.zeros(len(queries), self.num_database, dtype=torch.bool)
        for place, query in enumerate(queries):
            marked[place, list(rows[query])] = True
        return marked.to(self.device)


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """How well the database was sorted for each of Q queries; float64, on the device."""

    average_precision: Tensor
    """(Q,)"""
    found: Tensor
    """(Q, K) 1 where one of the first k is relevant, for each k that was asked for."""
    has_relevant: Tensor
    """(Q,) 1 where anything is relevant; elsewhere the others are 0."""


def rank(
    queries: Tensor,
    database: Tensor,
    relevance: Relevance,
    *,
    ks: Sequence[int],
    precision: Literal["steps", "trapezoids"],
    share: tuple[int, int] = (0, 1),
) -> Rankings:
    """Sort a database by its cosine similarity to each query; exact, part by part.

    Args:
        queries: (Q, D) float32, rows of length 1, on the device.
        database: (N, D) float32, rows of length 1, on the device or the host.
        relevance: what is relevant.
        ks: numbers of samples that are looked at.
        precision: area under the precision over recall: its mean over the relevant samples, or by trapezoids as in the
            evaluation of the Oxford and Paris buildings (evaluate.py of revisitop, Radenovic et al. 2018).
        share: number and count of those that share the queries; what others have is 0. Parts do not depend on it.
    """
    num = len(queries)
    made = Rankings(
        average_precision=queries.new_zeros(num, dtype=torch.float64),
        found=queries.new_zeros(num, len(ks), dtype=torch.float64),
        has_relevant=queries.new_zeros(num, dtype=torch.float64),
    )
    for part in list(_parts(num, len(database)))[share[0] :: share[1]]:
        rows = slice(part.start, part.stop)
        relevant, left_out = relevance.of(part)
        similarity = _similarity(queries[rows], database)
        if left_out is not None:
            # Sorted to the end: what comes before moves up, as if they were not there.
            similarity.masked_fill_(left_out, -torch.inf)
        hits = relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
        made.average_precision[rows] = _average_precision(hits, precision)
        made.found[rows] = torch.stack([hits[:, :k].any(dim=1) for k in ks], dim=1).double()
        made.has_relevant[rows] = hits.any(dim=1).double()
    return made


def _parts(num_queries: int, num_database: int) -> Iterator[range]:
    size = max(_CHUNK_ELEMENTS // num_database, 1)
    for begin in range(0, num_queries, size):
        yield range(begin, min(begin + size, num_queries))


def _similarity(queries: Tensor, database: Tensor) -> Tensor:
    parts = database.split(rows_at_once(database, queries.device))
    return torch.cat([queries @ part.to(queries.device).T for part in parts], dim=1)


def _average_precision(hits: Tensor, precision: Literal["steps", "trapezoids"]) -> Tensor:
    """(Q, N) bool, the most similar first -> (Q,) float64; 0 where nothing is relevant."""
    count = hits.cumsum(dim=1).double()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device, dtype=torch.float64)
    at_hit = count / ranks
    if precision == "trapezoids":
        before = torch.where(ranks > 1, (count - 1) / (ranks - 1).clamp(min=1), 1)
        at_hit = (at_hit + before) / 2
    return (at_hit * hits).sum(dim=1) / count[:, -1].clamp(min=1)


# Pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A line of a file of pairs."""

    query: str
    relevant: tuple[str, ...]
    junk: tuple[str, ...]


def read_pairs(path: str) -> list[Pair]:
    """Read a file of pairs: JSON lines with `query`, `relevant` and, if need be, `junk`, names of images.

    Raises:
        ValueError: the file is absent, or a line is not such an object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--pairs {path} cannot be read ({error}): give a file of JSON lines") from None
    found: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            relevant, junk = (values.get(name, []) for name in ("relevant", "junk"))
            names = [values["query"], *relevant, *junk]
            if not all(isinstance(each, list) for each in (relevant, junk)) or not all(
                isinstance(name, str) for name in names
            ):
                raise TypeError
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(
                f'--pairs {path}, line {number} is not an object such as {{"query": "a.jpg", "relevant": ["b.jpg"], '
                '"junk": []}}, names of images all of them'
            ) from None
        found.append(Pair(query=names[0], relevant=tuple(relevant), junk=tuple(junk)))
    if not any(pair.relevant for pair in found):
        raise ValueError(f"--pairs {path} names nothing relevant, so there is nothing to find")
    return found


def match(pairs: Sequence[Pair], queries: ShardSet, database: ShardSet) -> tuple[list[int], OfPairs]:
    """Find the samples of pairs by the names that their images had when they were packed.

    A name is the end of a path, by whole parts: `b.jpg` or `a/b.jpg` of `photos/a/b.jpg`.

    Args:
        pairs: those with nothing relevant are left out.
        queries: set that holds the queries.
        database: set that holds what is found; may be the same. A query itself is junk there.

    Returns:
        dense sample numbers of the queries, and what is relevant, in dense sample numbers.

    Raises:
        ValueError: a name is in no image's path or in several, or the sets do not say what images were called.
    """
    asked = [pair for pair in pairs if pair.relevant]
    of_queries = _Names(queries)
    of_database = of_queries if database is queries else _Names(database)
    numbers = [of_queries.find(pair.query) for pair in asked]
    relevant = [[of_database.find(name) for name in pair.relevant] for pair in asked]
    junk = [[of_database.find(name) for name in pair.junk] for pair in asked]
    if database is queries:
        for number, of_query in zip(numbers, junk, strict=True):
            of_query.append(number)
    host = torch.device("cpu")
    return numbers, OfPairs(relevant=relevant, junk=junk, num_database=database.num_samples, device=host)


class _Names:
    """Samples of a set by the names of their images."""

    def __init__(self, shards: ShardSet) -> None:
        self._where = shards.where
        self._by_name: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for number, source in enumerate(Origins(shards).sources(range(shards.num_samples))):
            if source is None:
                raise ValueError(
                    f"{shards.where} does not say what its images were called: give the folder that make-shards wrote, "
                    "with its *.sources.txt"
                )
            self._by_name[source.rpartition("/")[2]].append((f"/{source}", number))

    def find(self, name: str) -> int:
        found = [number for path, number in self._by_name[name.rpartition("/")[2]] if path.endswith(f"/{name}")]
        if len(found) != 1:
            how = "several images" if found else "no image"
            raise ValueError(f"{name!r} is the name of {how} in {self._where}: name one, with folders if need be")
        return found[0]
