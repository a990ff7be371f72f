from dataclasses import replace

import pytest
import torch

from moco_fast.transfer.network import build_detector
from moco_fast.transfer.optimizing import build_network_optimizer, lr_at, lr_scales, set_lr
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.presets import PRESETS, SEGMENT_PRESETS, settled
from tests.moco_fast.transfer.tiny import TINY, tiny_resnet, tiny_vit


def test_batch_norm_does_not_decay_and_everything_is_trained() -> None:
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=0)
    decays = {
        id(value): group["weight_decay"]
        for group in build_network_optimizer(detector, TINY).param_groups
        for value in group["params"]
    }
    for name, value in detector.named_parameters():
        is_norm = "bn" in name or "norm" in name or "downsample.1" in name
        assert decays[id(value)] == (0.0 if is_norm else 1e-4)
    assert len(decays) == len(list(detector.parameters()))


def test_the_learning_rate_is_that_of_the_authors_configuration() -> None:
    preset = PRESETS["voc-c4"]
    rates = {step: lr_at(preset, step) for step in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)}
    wanted = [0.02 / 1000, 0.02 * (0.5 / 1000 + 0.5), 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    assert list(rates.values()) == pytest.approx(wanted)


def test_layers_of_the_encoder_are_scaled_by_their_distance_from_what_is_new() -> None:
    """Layers as get_vit_lr_decay_rate of detectron2 numbers them, with 2 blocks."""
    preset = settled(SEGMENT_PRESETS["voc-semantic"], {"optimizer": "adamw", "layer_decay": 0.5})
    network = PixelNetwork(tiny_vit(), preset, num_classes=3, seed=0)
    optimizer = build_network_optimizer(network, preset)
    set_lr(optimizer, 0.8)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    decays = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    wanted = {
        "vit.patch_embed": 0.1,
        "vit.cls_token": 0.1,
        "vit.pos_embed": 0.1,
        "vit.blocks.0": 0.2,
        "vit.blocks.1": 0.4,
    }
    for name, value in network.named_parameters():
        [rate] = [rate for part, rate in wanted.items() if part in name] or [0.8]
        assert rates[id(value)] == pytest.approx(rate), name
        is_spared = (
            "norm" in name
            or "pos_embed" in name
            or name in {f"head.{n}.{part}" for n in (1, 4) for part in ("weight", "bias")}
        )
        assert decays[id(value)] == (0.0 if is_spared else 0.05), name
    assert len(rates) == len(list(network.parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)


def test_stages_of_a_resnet_are_layers_wherever_they_are() -> None:
    names = [name for name, _ in build_detector(tiny_resnet(), TINY, num_classes=3, seed=0).named_parameters()]
    scales = lr_scales(names, 0.5)
    wanted = {"backbone.conv1.weight": 5, "backbone.layer1.0.conv1.weight": 4, "backbone.layer3.0.bn2.bias": 2}
    wanted |= {"roi_heads.box_head.layer4.0.conv1.weight": 1, "roi_heads.box_head.norm.weight": 0}
    wanted |= {"rpn.head.cls_logits.bias": 0}
    assert {name: scales[name] for name in wanted} == {name: 0.5**distance for name, distance in wanted.items()}
    assert set(lr_scales(names, 1.0).values()) == {1.0}


def test_adamw_brings_settings_that_fit_it_unless_they_are_given() -> None:
    detect = settled(PRESETS["coco-fpn-1x"], {"optimizer": "adamw"}, batch_size=64)
    assert (detect.optimizer, detect.lr, detect.weight_decay, detect.layer_decay) == ("adamw", 1e-4, 0.1, 0.7)
    segment = settled(SEGMENT_PRESETS["voc-semantic"], {"optimizer": "adamw"})
    assert (segment.lr, segment.weight_decay, segment.layer_decay) == (1e-4, 0.05, 0.65)
    assert (segment.warmup_steps, segment.decays_norms, segment.crop) == (1500, False, 513)
    given = {"optimizer": "adamw", "lr": 3.0, "weight_decay": 0.0, "layer_decay": None}
    again = settled(PRESETS["voc-c4"], given)
    assert (again.lr, again.weight_decay, again.layer_decay) == (3.0, 0.0, 0.7)
    assert settled(PRESETS["voc-c4"], {"optimizer": "sgd"}) == PRESETS["voc-c4"]


def test_sgd_of_a_transformer_is_refused() -> None:
    preset = replace(SEGMENT_PRESETS["voc-semantic"], crop=32)
    network = PixelNetwork(tiny_vit(), preset, num_classes=3, seed=0)
    with pytest.raises(ValueError, match="give --optimizer adamw"):
        build_network_optimizer(network, preset)
