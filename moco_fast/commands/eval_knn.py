"""`moco-fast eval knn`."""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moco_fast.commands.common import Device, choose_device, given, positive
from moco_fast.config import KnnConfig, Layer
from pipelines.config import Backend

if TYPE_CHECKING:
    import torch

    from moco_fast.config import Config
    from moco_fast.encoders.encoder import Encoder
    from moco_fast.evaluation.knn import KnnResult

__all__ = ["EvalKnn"]


@dataclass(frozen=True, kw_only=True)
class EvalKnn:
    """Classify held-out samples by their nearest training samples, with the trained encoder and with it untrained."""

    checkpoint: str
    """Folder of a run (its newest checkpoint counts) or one of its checkpoints/step-*."""
    bank_shards: str | None = None
    """Labeled shards whose samples serve as neighbors; unset: the run's training shards."""
    query_shards: str | None = None
    """Labeled held-out shards to classify; unset: the run's --eval.shards."""
    k: int | None = None
    """Neighbors that vote; unset: the run's --eval.k."""
    temperature: float | None = None
    """Temperature of the vote's weights; unset: the run's --eval.temperature."""
    layer: Layer | None = None
    """What neighbors are compared by: the backbone's features or the head's output; unset: the run's --eval.layer."""
    max_bank: int | None = None
    """At most this many samples serve as neighbors; unset: the run's --eval.max-bank."""
    crop: float | None = None
    """Central square that is used, as a share of the shorter side; unset: the run's --eval.crop."""
    backend: Literal["auto", Backend] | None = None
    """What decodes; unset: the run's --data.backend."""
    batch_size: int = 256
    """Images computed at once."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""
    json: bool = False
    """Print one line of JSON instead."""

    def execute(self) -> int:
        """Do what the options say; return the exit code."""
        from moco_fast.checkpoint import load_encoder
        from moco_fast.evaluation.untrained import untrained_twin

        config, encoder = load_encoder(self.checkpoint)
        device = choose_device(self.device)
        results = {
            name: self._knn(config, model.to(device), device)
            for name, model in (("trained", encoder), ("untrained", untrained_twin(config)))
        }
        trained, untrained = results["trained"], results["untrained"]
        layer = given(self.layer, config.eval.layer)
        if self.json:
            facts = {"top1": trained.top1, "untrained_top1": untrained.top1, "k": trained.k, "layer": layer}
            print(json.dumps(facts | {"num_bank": trained.num_bank, "num_queries": trained.num_queries}))
            return 0
        if trained.note:
            print(f"note: {trained.note}", file=sys.stderr)
        by = f"{trained.k} of {trained.num_bank:,} neighbors ({layer} features)"
        print(f"kNN top-1 of {trained.num_queries:,} held-out samples by {by}:")
        print(f"  trained    {100 * trained.top1:5.1f}%")
        print(f"  untrained  {100 * untrained.top1:5.1f}%")
        return 0

    def _knn(self, config: "Config", encoder: "Encoder", device: "torch.device") -> "KnnResult":
        from moco_fast.evaluation.knn import evaluate_knn
        from shards.sets import open_set

        query_shards = self.query_shards or config.eval.shards
        if query_shards is None:
            raise ValueError("the run has no held-out samples: name some with --query-shards")
        knn = KnnConfig(
            k=positive("k", given(self.k, config.eval.k)),
            temperature=positive("temperature", given(self.temperature, config.eval.temperature)),
            layer=given(self.layer, config.eval.layer),
            crop=given(self.crop, config.eval.crop),
            max_bank=positive("max-bank", given(self.max_bank, config.eval.max_bank)),
        )
        return evaluate_knn(
            encoder,
            knn,
            bank=open_set(self.bank_shards or config.data.shards),
            queries=open_set(query_shards),
            size=config.views.size,
            data=replace(config.data, batch_size=self.batch_size, backend=self.backend or config.data.backend),
            device=device,
        )
