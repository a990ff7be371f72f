"""Memory bank: one stored key per sample (Wu et al. 2018; MoCo v1, figure 2b)."""

from dataclasses import dataclass
from typing import ClassVar

from moco_fast.methods.base import (
    BatchStatistics,
    Objective,
    Setting,
    refuse_unless_above_zero,
    refuse_unless_average,
)
from moco_fast.methods.contrastive import PlainHead

__all__ = ["MemoryBank"]


@dataclass(frozen=True, kw_only=True)
class MemoryBank(PlainHead):
    """Contrast with a memory bank of one key per sample; no image is encoded for keys."""

    name: ClassVar[str] = "memory-bank"
    num_negatives: int = 65536
    """Number of negatives drawn from the bank per batch and shared by its queries (the paper's K)."""
    momentum: float = 0.5
    """Momentum of the moving average that updates a sample's key from its queries."""

    num_views: ClassVar[int] = 1
    needs_sample_numbers: ClassVar[bool] = True
    # No key images, so there is nothing to shuffle.
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("auto", "virtual", "sync", "none")

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"num_negatives": self.num_negatives})
        refuse_unless_average("momentum", self.momentum)

    @property
    def dictionary_size(self) -> int | None:
        """Return the number of keys that are drawn."""
        return self.num_negatives

    def num_choices(self, batch_size: int, /) -> int:
        """Return the number of drawn keys plus the query's own."""
        del batch_size
        return self.num_negatives + 1

    def build(self, setting: Setting, /) -> Objective:
        """Build the bank. Raises ValueError: it does not fit into memory."""
        import torch

        from moco_fast.methods.dictionary import Bank
        from moco_fast.methods.discrimination import Discrimination
        from moco_fast.methods.keys import BankKeys

        size_bytes = setting.num_samples * self.dim * 4
        if size_bytes > setting.available_bytes:
            raise ValueError(
                f"a memory bank takes {setting.num_samples:,} samples x {self.dim} features x 4 bytes = "
                f"{size_bytes / 2**30:.1f} GiB on every rank, but {setting.available_bytes / 2**30:.1f} GiB are free: "
                "train by momentum contrast (moco-v1), whose queue does not grow with the set"
            )
        generator = torch.Generator().manual_seed(setting.seed)
        bank = Bank(
            self.dim, setting.num_samples, generator, num_negatives=self.num_negatives, momentum=self.momentum
        ).to(setting.device)
        return Discrimination(
            keys=BankKeys(bank), dictionary=bank, temperature=self.temperature, modules={"queue": bank}
        )
