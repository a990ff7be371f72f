"""Our loader in Lightning, which trains an encoder to give two views of a sample the same vector (SimSiam's loss).

python examples/with_lightning.py shards/train
"""

import sys

import lightning
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import moco_fast
from pipelines.config import VIEWS, DataConfig


class SimSiam(lightning.LightningModule):
    """An encoder and its predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18(num_classes=64)
        self.predictor = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64))

    def transfer_batch_to_device(self, batch, _device, _number):
        return batch  # The loader's batches are where they are needed.

    def training_step(self, batch, _number) -> torch.Tensor:
        first, second = (self.encoder(view / 255) for view in batch.views)
        pairs = ((first, second), (second, first))
        loss = -sum(F.cosine_similarity(self.predictor(a), b.detach()).mean() for a, b in pairs) / 2
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def main(shards: str, steps: str = "20") -> None:
    data = DataConfig(shards=shards, batch_size=32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = lightning.Trainer(max_steps=int(steps), accelerator=device.type, devices=1, logger=False)
    with moco_fast.open_loader(data, VIEWS["cifar10"], seed=0, device=device) as loader:
        trainer.fit(SimSiam(), loader)
    print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
