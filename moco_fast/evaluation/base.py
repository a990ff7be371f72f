"""The contract of an evaluation that a run does at intervals. Free of training: it is given an encoder."""

from collections.abc import Mapping
from typing import Protocol

import torch

from moco_fast.encoders.encoder import Encoder
from pipelines.world import World

__all__ = ["Evaluation"]


class Evaluation(Protocol):
    """An evaluation with its settings, on sets that are open already."""

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
