"""Train an encoder of one's own: a backbone with `num_features`, under a name that the recipes can use.

accelerate launch --config_file deploy/accelerate/cpu-1.yaml examples/custom_encoder.py shards/train runs/mine
"""

import sys

from torch import nn

import moco_fast
from moco_fast.encoders.encoder import ENCODERS


class SmallNet(nn.Sequential):
    """Normalized pixels (B, 3, H, W) to features (B, 64)."""

    num_features = 64

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers)


def main(shards: str, run: str, steps: str = "200") -> int:
    ENCODERS["small_net"] = SmallNet
    options = {"data.shards": shards, "run.out": run, "run.steps": int(steps), "model.encoder": "small_net"}
    return moco_fast.train(moco_fast.configure("demo", options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
