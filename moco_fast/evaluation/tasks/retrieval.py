"""Retrieval as a task: each test sample is a query, and what is relevant should come first in a database."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Measured, Outcome, Task, Want, refuse_unless_above
from shards.ground.units import counted

if TYPE_CHECKING:
    from torch import Tensor

    from moco_fast.evaluation.retrieval import Relevance

__all__ = ["Retrieval"]


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Sort a database by similarity to each query: mean average precision, and whether something relevant is near."""

    name: ClassVar[str] = "retrieval"
    draws: ClassVar[bool] = False
    live: ClassVar[bool] = True

    database: Literal["train", "test"] = "train"
    """Set that is sorted: the training set, or the test set without the query."""
    pairs: str | None = field(default=None, metadata={"metavar": "FILE"})
    """File of JSON lines that says by names of images what is relevant to which query (docs/evaluation.md). Unset:
    samples of the same class."""
    k: tuple[int, ...] = (1, 5, 10)
    """Numbers of nearest samples among which something relevant is looked for."""
    layer: str = "backbone"
    """What is compared: backbone, head, or another layer (docs/evaluation.md)."""

    @property
    def needs_labels(self) -> bool:
        """Whether the labels say what is relevant."""
        return self.pairs is None

    @property
    def shared(self) -> bool:
        """Every rank sorts for its share of the queries."""
        return True

    @property
    def preset(self) -> str:
        """Whether pairs say what is relevant."""
        return "" if self.pairs is None else "pairs"

    def validate(self) -> None:
        """Refuse numbers that cannot be, and a file that is none of pairs."""
        refuse_unless_above(0, k=self.k)
        check_layer(self.layer)
        if self.pairs is not None:
            from moco_fast.evaluation.retrieval import read_pairs

            read_pairs(self.pairs)

    def why_not(self, known: Known) -> str | None:
        """Ask for something relevant to some query."""
        if self.pairs is not None:
            from moco_fast.evaluation.retrieval import match, read_pairs

            try:
                match(read_pairs(self.pairs), known.set_of("test"), known.set_of(self.database))
            except ValueError as error:
                return str(error)
            return None
        queries, database = known.label_counts("test"), known.label_counts(self.database)
        size = min(len(queries), len(database))
        least = 2 if self.database == "test" else 1
        if not ((queries[:size] > 0) & (database[:size] >= least)).any():
            return "no query has another sample of its class in the database, so there is nothing to find"
        return None

    def wants(self) -> tuple[Want, ...]:
        """Queries and database."""
        splits = dict.fromkeys(("test", self.database))
        return tuple(Want(split=split, layer=self.layer, unit=True) for split in splits)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Mean average precision, and recall."""
        infos = {
            "map": FigureInfo(
                title="retrieval mAP",
                caption="Mean over the queries of the average precision with which the database is sorted.",
            )
        }
        for k in self.k:
            infos[f"recall_at_{k}"] = FigureInfo(
                title=f"recall@{k}", caption=f"Share of queries that have something relevant among the {k} nearest."
            )
        return infos

    def measure(self, inputs: Inputs) -> Outcome:
        """Sort the database for this rank's share of the queries."""
        import torch.distributed as dist

        from moco_fast import distributed
        from moco_fast.evaluation.features import near
        from moco_fast.evaluation.retrieval import rank
        from moco_fast.interrupt import may_be_interrupted

        queries, relevance, num_left_out = self._asked(inputs)
        of_database = inputs.features(self.wants()[-1], labeled=self.needs_labels)
        world = inputs.world
        with may_be_interrupted():
            found = rank(
                queries,
                near(of_database.values, inputs.device),
                relevance,
                ks=self.k,
                precision="steps" if self.pairs is None else "trapezoids",
                share=(world.rank, world.world_size),
            )
        if world.world_size > 1:
            distributed.leave_together()
            for values in (found.average_precision, found.found, found.has_relevant):
                dist.all_reduce(values)
        # Means on the host: sums of a GPU are in another order each time.
        average_precision, of_k, counts = (
            values.cpu() for values in (found.average_precision, found.found, found.has_relevant)
        )
        num = int(counts.sum())
        if not num:
            raise ValueError("no query has anything relevant in the database, so there is nothing to find")
        figures = {"map": Measured(value=float(average_precision.sum()) / num)}
        for k, hits in zip(self.k, of_k.sum(dim=0).tolist(), strict=True):
            figures[f"recall_at_{k}"] = Measured(value=hits / num, num_trials=num)
        num_left_out += len(queries) - num
        left_out = counted(num_left_out, "query", plural="queries")
        note = f"left out: {left_out}, to which nothing in the database is relevant"
        return Outcome(
            figures=figures,
            facts={"num_queries": num, "num_database": len(of_database)},
            notes=(note,) if num_left_out else (),
        )

    def _asked(self, inputs: Inputs) -> "tuple[Tensor, Relevance, int]":
        """Return the queries' features, what is relevant, and how many queries are left out from the start."""
        from dataclasses import replace

        from moco_fast.evaluation.retrieval import SameLabel, match, read_pairs

        features = inputs.features(self.wants()[0], labeled=self.needs_labels)
        if self.pairs is not None:
            pairs = read_pairs(self.pairs)
            rows, relevance = match(pairs, inputs.set_of("test"), inputs.set_of(self.database))
            values = features.values[rows].to(inputs.device)
            return values, replace(relevance, device=inputs.device), len(pairs) - len(rows)
        of_database = inputs.features(self.wants()[-1])
        relevance = SameLabel(
            queries=features.labels,
            database=of_database.labels.to(inputs.device),
            itself=self.database == "test",
        )
        return features.values.to(inputs.device), relevance, 0
