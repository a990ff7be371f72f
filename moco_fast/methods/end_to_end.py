"""End-to-end: keys of the query encoder itself, with gradients, told from those of the batch (MoCo v1, figure 2a)."""

from dataclasses import dataclass
from typing import ClassVar

from moco_fast.methods.base import BatchStatistics, Objective, Setting
from moco_fast.methods.contrastive import PlainHead

__all__ = ["EndToEnd"]


@dataclass(frozen=True, kw_only=True)
class EndToEnd(PlainHead):
    """Keys of the query encoder itself, with gradients, told from those of the same batch."""

    name: ClassVar[str] = "end-to-end"
    # `gather` carries no gradients, which the keys need.
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("auto", "exchange", "virtual", "sync", "none")

    def num_choices(self, batch_size: int, /) -> int:
        """Count the keys of the batch."""
        return batch_size

    def build(self, setting: Setting, /) -> Objective:
        """Build what has no state of its own."""
        from moco_fast.methods.dictionary import InBatch
        from moco_fast.methods.discrimination import Discrimination
        from moco_fast.methods.keys import QueryKeys

        return Discrimination(keys=QueryKeys(setting.policy), dictionary=InBatch(), temperature=self.temperature)
