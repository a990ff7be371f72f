"""Encoders of gray images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_fast.checkpoint import load_encoder
from moco_fast.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, validate
from moco_fast.encoders.encoder import build_encoder, check_image_size
from moco_fast.exporters.registry import EXPORTERS, find_exporter
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.presets import PRESETS
from moco_fast.training.loop import train
from tests.moco_fast.small_runs import small_run
from tests.pipelines.shard_files import jpeg, write_shards

METHOD = MomentumContrast(dim=8)
GRAY = ModelConfig(encoder="resnet18_quarter", channels=1)


def pixels(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_layer_of_one_channel_sees_gray_values(memory_format: torch.memory_format) -> None:
    encoder = build_encoder(GRAY, METHOD).eval()
    images = pixels(2, 3, 32, 32).contiguous(memory_format=memory_format)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = (images.double() / 255 - mean) / std
    gray = 0.299 * normalized[:, 0] + 0.587 * normalized[:, 1] + 0.114 * normalized[:, 2]
    made = encoder.normalize(images)
    assert made.shape == (2, 1, 32, 32)
    assert torch.allclose(made[:, 0].double(), gray, atol=1e-5)
    assert torch.equal(encoder.features(images, "backbone"), encoder.backbone(made))
    assert sum("gray" in name for name in encoder.state_dict()) == 0


@pytest.mark.parametrize(
    "model",
    [
        GRAY,
        dataclasses.replace(GRAY, stem="cifar"),
        dataclasses.replace(GRAY, encoder="resnet18", stem="cifar"),
        dataclasses.replace(GRAY, encoder="vit_tiny_patch16_224"),
        dataclasses.replace(GRAY, encoder="mobilenetv3_small_050"),
    ],
    ids=lambda model: f"{model.encoder}-{model.stem}",
)
def test_networks_have_one_channel_fewer_than_three_and_no_other_difference(model: ModelConfig) -> None:
    gray, color = (
        build_encoder(dataclasses.replace(model, channels=channels), METHOD, image_size=224) for channels in (1, 3)
    )
    check_image_size(gray, model.encoder, 224)
    shapes = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (gray, color)]
    apart = [name for name in shapes[1] if shapes[0][name] != shapes[1][name]]
    assert len(apart) == 1
    assert (shapes[0][apart[0]][1], shapes[1][apart[0]][1]) == (1, 3)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused_with_the_reason(channels: int) -> None:
    config = dataclasses.replace(PRESETS["demo"][1], model=ModelConfig(channels=channels))
    with pytest.raises(ValueError, match=f"--model.channels is {channels}, but shards hold JPEGs"):
        validate(config)


def test_only_programs_take_them_elsewhere() -> None:
    takes = {
        name for name in EXPORTERS if find_exporter(name).why_not(dataclasses.replace(GRAY, encoder="resnet50")) is None
    }
    assert takes == {"onnx", "torch-export"}


def test_a_run_on_gray_images(tmp_path: Path) -> None:
    images = [jpeg(pixels(40, 48).numpy()) for _ in range(32)]
    config = small_run(write_shards(tmp_path / "set", images), tmp_path / "run", steps=2)
    assert train(dataclasses.replace(config, model=GRAY)) == 0
    _, encoder = load_encoder(tmp_path / "run")
    assert encoder.channels == 1
    assert encoder.features(pixels(2, 3, 32, 32), "backbone").isfinite().all()
