"""Presets: published recipes, each a whole configuration with the numbers of its paper or of the authors' code."""

from dataclasses import replace

import tyro

from moco_fast.config import (
    BatchNormConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam
from pipelines.config import VIEWS, DataConfig, ViewsConfig

__all__ = ["PRESETS"]

# The user must name the shards for every preset.
_DATA = DataConfig(shards=tyro.MISSING)

_MOCO_V1 = Config(
    data=_DATA,
    views=VIEWS["moco-v1"],
    method=MomentumContrast(head="linear", temperature=0.07),
    optim=OptimConfig(schedule="step"),
)

# Section 4, "Training": 64 GPUs, the learning rate times 0.9 every 62,500 of 1.25 million steps.
_MOCO_V1_1B = replace(
    _MOCO_V1,
    data=replace(_DATA, batch_size=1024),
    optim=OptimConfig(lr=0.12, published=((1024, 0.12),), schedule="exponential", decay=0.9, decay_every=0.05),
    run=RunConfig(steps=1_250_000),
    checkpoint=CheckpointConfig(every_steps=5000),
)

# Section 4.1, figure 3: the other two mechanisms, with v1's encoder and views. A batch of 1,024 is the largest there,
# with its learning rate by the linear rule.
_END_TO_END = replace(
    _MOCO_V1,
    data=replace(_DATA, batch_size=1024),
    method=EndToEnd(head="linear", temperature=0.07),
    optim=replace(_MOCO_V1.optim, lr=0.12, published=((256, 0.03), (512, 0.06), (1024, 0.12))),
)
_MEMORY_BANK = replace(_MOCO_V1, method=MemoryBank(head="linear", temperature=0.07, momentum=0.5))

_MOCO_V2 = Config(data=_DATA, views=VIEWS["moco-v2"], method=MomentumContrast())

_MOCO_V2_SYMMETRIC = replace(_MOCO_V2, method=MomentumContrast(symmetric=True))

# Multi-crop for the queries: --enable-multicrop of main_moco.py in facebookresearch/asym-siam, for which its README
# gives 100 epochs. Its head has batch norm and one more layer ("MoCo BN"); this one is v2's.
_MOCO_V2_MULTICROP = replace(_MOCO_V2, views=VIEWS["moco-v2-multicrop"], run=RunConfig(epochs=100))

# Learning rates are the published ones per 256 samples, times 4096 / 256.
_MOCO_V3_RESNET50 = Config(
    data=replace(_DATA, batch_size=4096),
    views=VIEWS["moco-v3"],
    model=ModelConfig(zero_init_residual=True),
    method=MomentumContrastV3(temperature=1.0),
    bn=BatchNormConfig(policy="sync"),
    optim=OptimConfig(name="lars", lr=0.6 * 16, published=((4096, 0.6 * 16),), weight_decay=1e-6, warmup=0.1),
    run=RunConfig(epochs=100),
)
_MOCO_V3_VIT_SMALL = Config(
    data=replace(_DATA, batch_size=4096),
    views=VIEWS["moco-v3-vit"],
    model=ModelConfig(encoder="vit_small", freeze_patch_projection=True),
    method=MomentumContrastV3(temperature=0.2),
    bn=BatchNormConfig(policy="sync"),
    optim=OptimConfig(
        name="adamw", lr=1.5e-4 * 16, published=((4096, 1.5e-4 * 16),), weight_decay=0.1, warmup=40 / 300
    ),
    run=RunConfig(epochs=300),
)
_MOCO_V3_VIT_BASE = replace(_MOCO_V3_VIT_SMALL, model=replace(_MOCO_V3_VIT_SMALL.model, encoder="vit_base"))

# The paper's appendix and byol/configs/byol.py of google-deepmind/deepmind-research, 300 epochs: base learning rate 0.3
# per 256 samples, 10 epochs of warm-up, statistics over all devices. Its augmentations (table 6) are those that MoCo v3
# adopted for transformers.
_BYOL = Config(
    data=replace(_DATA, batch_size=4096),
    views=VIEWS["moco-v3-vit"],
    method=Byol(momentum=0.99),
    bn=BatchNormConfig(policy="sync"),
    optim=OptimConfig(name="lars", lr=0.3 * 16, published=((4096, 0.3 * 16),), weight_decay=1e-6, warmup=10 / 300),
    run=RunConfig(epochs=300),
)

# main_simsiam.py of facebookresearch/simsiam: base learning rate 0.05 per 256 samples, MoCo v2's views.
_SIMSIAM = Config(
    data=replace(_DATA, batch_size=512),
    views=VIEWS["moco-v2"],
    model=ModelConfig(zero_init_residual=True),
    method=SimSiam(),
    bn=BatchNormConfig(policy="sync"),
    optim=OptimConfig(lr=0.05 * 2, published=((512, 0.05 * 2),)),
    run=RunConfig(epochs=100),
)

_CIFAR10 = Config(
    data=replace(_DATA, batch_size=512),
    views=VIEWS["cifar10"],
    model=ModelConfig(
        encoder="resnet18",
        stem="cifar",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    method=MomentumContrast(head="linear", queue_size=4096, momentum=0.99, temperature=0.1),
    bn=BatchNormConfig(num_groups=8),
    optim=OptimConfig(lr=0.06, published=((512, 0.06),), weight_decay=5e-4),
    eval=EvalConfig(temperature=0.1, layer="head", crop=1.0),
)

# MoCo v2 for images of 64 pixels and a run of minutes: blur in proportion to the view, a dictionary that the first
# steps fill, and a key encoder that follows within the run.
_DEMO_VIEW = replace(VIEWS["moco-v2"].query, blur_sigma=(0.1, 0.6))
_DEMO = Config(
    data=replace(_DATA, batch_size=128),
    views=ViewsConfig(size=64, query=_DEMO_VIEW, key=_DEMO_VIEW),
    model=ModelConfig(encoder="resnet18_half"),
    method=MomentumContrast(queue_size=1024, momentum=0.99, temperature=0.1),
    bn=BatchNormConfig(num_groups=4),
    optim=OptimConfig(lr=0.06, published=(), weight_decay=5e-4),
    run=RunConfig(steps=200),
    checkpoint=CheckpointConfig(every_steps=100),
    eval=EvalConfig(every_steps=50, k=20, temperature=0.1, crop=1.0),
    log=LogConfig(every_steps=5),
)

_ALL: dict[str, tuple[str, Config]] = {
    "moco-v1": ("MoCo v1: ResNet-50, linear head, step schedule; 200 epochs at batch 256 (He et al. 2020)", _MOCO_V1),
    "moco-v1-1b": ("MoCo v1 for a billion images: batch 1,024, 1.25 million steps (He et al. 2020)", _MOCO_V1_1B),
    "moco-v2": ("MoCo v2: v1 with an MLP head, blur and a cosine schedule (Chen et al. 2020)", _MOCO_V2),
    "moco-v2-symmetric": ("MoCo v2 with each view used once as query and once as key", _MOCO_V2_SYMMETRIC),
    "moco-v2-multicrop": (
        "MoCo v2 with six more views of 96 pixels as queries; 100 epochs (Wang et al. 2022)",
        _MOCO_V2_MULTICROP,
    ),
    "moco-v3-resnet50": ("MoCo v3: no queue, LARS, batch 4,096; 100 epochs (Chen et al. 2021)", _MOCO_V3_RESNET50),
    "moco-v3-vit-small": ("MoCo v3 with ViT-S/16: AdamW, batch 4,096; 300 epochs", _MOCO_V3_VIT_SMALL),
    "moco-v3-vit-base": ("MoCo v3 with ViT-B/16: AdamW, batch 4,096; 300 epochs", _MOCO_V3_VIT_BASE),
    "end-to-end": ("The paper's first alternative: keys with gradients, the batch as dictionary", _END_TO_END),
    "memory-bank": ("The paper's second alternative: one stored key per sample", _MEMORY_BANK),
    "byol": (
        "BYOL: predict a momentum encoder's projection, no negatives; 300 epochs at batch 4,096 (Grill et al. 2020)",
        _BYOL,
    ),
    "simsiam": ("SimSiam: predict one's own projection, no negatives; 100 epochs (Chen & He 2021)", _SIMSIAM),
    "cifar10": ("The authors' CIFAR-10 demo: ResNet-18 for 32-pixel images, 8 virtual BN groups", _CIFAR10),
    "demo": ("MoCo v2 with a small encoder, as in `make demo`; minutes on two CPU cores", _DEMO),
}

PRESETS = {name: (line, replace(config, recipe=name)) for name, (line, config) in _ALL.items()}
"""Name -> (one line for `--help`, configuration)."""
