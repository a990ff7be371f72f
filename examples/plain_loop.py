"""Our loader in a training loop of one's own: here SimCLR's loss, with a ResNet of torchvision's.

python examples/plain_loop.py shards/train
"""

import sys
from itertools import islice

import torch
import torch.nn.functional as F
import torchvision

import moco_fast
from pipelines.config import VIEWS, DataConfig


def loss_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Find each vector's twin among all others: (B, D) twice."""
    vectors = F.normalize(torch.cat([first, second]))
    similarities = (vectors @ vectors.T / 0.2).fill_diagonal_(float("-inf"))
    return F.cross_entropy(similarities, torch.arange(len(vectors), device=vectors.device).roll(len(first)))


def main(shards: str, steps: str = "20") -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = torchvision.models.resnet18(num_classes=64).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9)
    data = DataConfig(shards=shards, batch_size=32)
    with moco_fast.open_loader(data, VIEWS["cifar10"], seed=0, device=device) as loader:
        for step, batch in enumerate(islice(loader, int(steps))):
            loss = loss_of(*(encoder(view / 255) for view in batch.views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
