"""Contract of an evaluation that a run does at intervals. Free of training: it is given an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.methods.base import Chart
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["Evaluation", "RunSets", "Score"]


@dataclass(frozen=True, kw_only=True)
class RunSets:
    """The sets of a run, each opened once."""

    training: ShardSet | None
    """Of --data.shards; None where tars without an index are streamed."""
    held_out: ShardSet | None
    """Of --eval.shards; None where that is unset."""


@dataclass(frozen=True, kw_only=True)
class Score(Chart):
    """A chart of the report of what an evaluation finds; the newest value of its first curve is shown as a number, too.

    Where `level` is unset, the curve is compared with its value before the first step: the untrained encoder's.
    """

    name: str
    """What the number is called, such as `kNN top-1`."""
    best: Literal["highest", "lowest"]
    """Which of its values is the best one."""

    @property
    def figure(self) -> str:
        """Name of the number in metrics.jsonl."""
        return next(iter(self.curves))


class Evaluation(Protocol):
    """An evaluation with its settings, on sets that are open already."""

    @classmethod
    def open(cls, config: Config, sets: RunSets) -> Self | None:
        """Prepare the evaluation; None where the configuration does not ask for it.

        Raises:
            ValueError: the sets do not fit.
        """
        ...

    @classmethod
    def scores(cls, config: Config) -> tuple[Score, ...]:
        """Say how the report shows the figures of a run, whose sets need not be there any more."""
        ...

    def figures(self, encoder: Encoder, *, device: torch.device, world: World) -> dict[str, float]:
        """Evaluate an encoder; collective: every rank calls it and gets the figures.

        Args:
            encoder: on `device`; its modes are left as they were.
            device: where to compute.
            world: this process and how many take part.

        Returns:
            figures by their names in metrics.jsonl, such as `knn/top1`.

        Raises:
            ValueError: the samples or the encoder's features cannot be evaluated.
        """
        ...

    def line(self, figures: Mapping[str, float]) -> str:
        """Say the figures in a few words, for the terminal."""
        ...
