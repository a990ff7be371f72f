"""A small network of every family that timm has: built, one forward and one backward pass, by shapes alone."""

import pytest
import timm
import torch
from timm.models import list_modules

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast

SMALL = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_so150m2_patch16_reg1_map",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "beit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""Family -> the network of fewest parameters; of a newer family, the one with the shortest name is taken."""
OF_ONE_SIZE = {
    "halonet_h1": 256,
    "crossvit_tiny_240": 240,
    "deepseek_vit_412m": 546,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 299,
    "inception_v3": 299,
    "inception_v4": 299,
}
"""Networks that do not take images of 64 pixels, and the size that they take."""


QUICK = {
    "byobnet",
    "convnext",
    "efficientnet",
    "efficientvit_mit",
    "inception_v3",
    "mambaout",
    "maxxvit",
    "mobilenetv3",
    "nfnet",
    "resnet",
    "vgg",
    "vision_transformer",
    "vision_transformer_relpos",
}
"""Families of every shape: features wider than `num_features`, positions, one size alone, no pooling of their own."""
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in list_modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family: str) -> None:
    name = SMALL.get(family) or min(timm.list_models(module=family), key=len)
    size = OF_ONE_SIZE.get(name, 64)
    # Nothing is computed on this device: shapes are.
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(dim=16), image_size=size)
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        assert encoder.features(images, "backbone").shape == (2, encoder.feature_dim)
        queries = encoder(images)
        assert isinstance(queries, torch.Tensor)
        assert queries.shape == (2, 16)
        queries.sum().backward()
    learned = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert any(name.startswith("head.") for name in learned)
    assert any(name.startswith("backbone.") for name in learned)
