"""Best value so far of a figure that evaluations measure: which checkpoint is kept beside the newest ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco_fast.evaluation.base import Evaluation

__all__ = ["Best", "best_of"]


@dataclass(kw_only=True)
class Best:
    """Best value so far, after the first step."""

    figure: str
    """Its name in metrics.jsonl."""
    is_lowest: bool
    """Whether the lowest value is the best one."""
    value: float = math.nan
    step: int | None = None
    """After which it was measured; None: it has not been measured yet."""

    def takes(self, figures: Mapping[str, float], *, step: int) -> bool:
        """Take in the figures of an evaluation; return whether this one's value is better than all before.

        Raises:
            ValueError: the figure is not among them.
        """
        if self.figure not in figures:
            raise ValueError(
                f"--checkpoint.keep-best {self.figure} is not measured on these sets, only {', '.join(figures)}: "
                "choose one of these"
            )
        value = figures[self.figure]
        # The weights that a run starts from are not a result of it.
        if step == 0 or math.isnan(value):
            return False
        if self.step is not None and (value >= self.value if self.is_lowest else value <= self.value):
            return False
        self.value, self.step = value, step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return figure, value and step as JSON can hold them; nothing if there is no value yet."""
        return {} if self.step is None else {"figure": self.figure, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, unless that was of another figure."""
        if state.get("figure") == self.figure:
            self.value, self.step = state["value"], state["step"]


def best_of(figure: str | None, evaluation: Evaluation | None) -> Best | None:
    """Begin to watch the figure that --checkpoint.keep-best names; None: it names none.

    Raises:
        ValueError: the run does not measure it.
    """
    if figure is None:
        return None
    if evaluation is None:
        raise ValueError(f"--checkpoint.keep-best {figure} is never measured: name held-out shards with --eval.shards")
    infos = evaluation.infos
    if figure not in infos:
        raise ValueError(
            f"--checkpoint.keep-best {figure} is never measured: choose one of {', '.join(infos)}, or see --eval.tasks"
        )
    return Best(figure=figure, is_lowest=infos[figure].best == "lowest")
