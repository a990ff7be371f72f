"""End-to-end contrast: keys of the query encoder itself, with gradients (MoCo v1, figure 2a)."""

from dataclasses import dataclass
from typing import ClassVar

from moco_fast.methods.base import BatchStatistics, Objective, Setting
from moco_fast.methods.contrastive import PlainHead

__all__ = ["EndToEnd"]


@dataclass(frozen=True, kw_only=True)
class EndToEnd(PlainHead):
    """Keys of the query encoder itself, with gradients; negatives are the other keys of the batch."""

    name: ClassVar[str] = "end-to-end"
    # `gather` carries no gradients, which the keys need.
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("auto", "exchange", "virtual", "sync", "none")

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Return the query and its key, which has a gradient, too."""
        return 2, 0

    def num_choices(self, batch_size: int, /) -> int:
        """Return the number of keys in the batch."""
        return batch_size

    def build(self, setting: Setting, /) -> Objective:
        """Build the objective, which has no state of its own."""
        from moco_fast.methods.dictionary import InBatch
        from moco_fast.methods.discrimination import Discrimination
        from moco_fast.methods.keys import QueryKeys

        return Discrimination(keys=QueryKeys(setting.policy), dictionary=InBatch(), temperature=self.temperature)
