"""The published recipes, each a whole configuration with the numbers of its paper or of the authors' code."""

from dataclasses import replace

import tyro

from moco_fast.config import (
    BatchNormConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    MocoConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from pipelines.config import VIEWS, DataConfig

__all__ = ["PRESETS"]

# The shards are the user's: every preset asks for them.
_DATA = DataConfig(shards=tyro.MISSING)

_MOCO_V1 = Config(
    data=_DATA,
    views=VIEWS["moco-v1"],
    model=ModelConfig(head="linear"),
    moco=MocoConfig(temperature=0.07),
    optim=OptimConfig(schedule="step"),
)

_MOCO_V2 = Config(data=_DATA, views=VIEWS["moco-v2"])

_CIFAR10 = Config(
    data=replace(_DATA, batch_size=512),
    views=VIEWS["cifar10"],
    model=ModelConfig(encoder="resnet18", stem="cifar", head="linear"),
    moco=MocoConfig(queue_size=4096, momentum=0.99, temperature=0.1),
    bn=BatchNormConfig(num_groups=8),
    optim=OptimConfig(lr=0.06, weight_decay=5e-4),
    eval=EvalConfig(temperature=0.1, crop=1.0),
)

_DEMO = replace(
    _CIFAR10,
    data=replace(_DATA, batch_size=128, backend="dali"),
    optim=OptimConfig(lr=0.06, weight_decay=5e-4),
    run=RunConfig(steps=300),
    checkpoint=CheckpointConfig(every_steps=100),
    eval=EvalConfig(every_steps=100, temperature=0.1, crop=1.0),
    log=LogConfig(every_steps=5),
)

PRESETS: dict[str, tuple[str, Config]] = {
    "moco-v1": ("MoCo v1: ResNet-50, linear head, step schedule; 200 epochs at batch 256 (He et al. 2020)", _MOCO_V1),
    "moco-v2": ("MoCo v2: v1 with an MLP head, blur and a cosine schedule (Chen et al. 2020)", _MOCO_V2),
    "cifar10": ("The authors' CIFAR-10 demo: ResNet-18 for 32-pixel images, 8 virtual BN groups", _CIFAR10),
    "demo": ("What `make demo` runs: the CIFAR recipe with a small encoder, minutes on two CPU cores", _DEMO),
}
"""Name -> (one line for `--help`, configuration)."""
