"""Folders of transformers' ResNet and ViT, written by the library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moco_fast.encoders.open import open_encoder
from tests.moco_fast.encoders.layouts import as_if_trained, pixels

SMALL_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
}
RESNET18 = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
IMAGES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.6]}


def save(folder: Path, kind: str, settings: dict[str, Any], **images: Any) -> Any:
    """Let transformers write a folder of one of its networks, with weights of no meaning."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(5)
    config = (transformers.ResNetConfig if kind.startswith("ResNet") else transformers.ViTConfig)(**settings)
    network = as_if_trained(getattr(transformers, kind)(config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES | images))
    return network


def features(network: nn.Module, images: Tensor) -> Tensor:
    for name in ("resnet", "vit"):
        network = getattr(network, name, network)
    found: Any = network(images)
    if isinstance(network, transformers.ResNetModel):
        return found.pooler_output.flatten(1)
    return found.last_hidden_state[:, 0]


@pytest.mark.parametrize(
    ("kind", "settings", "left_out"),
    [
        ("ResNetModel", RESNET18, set()),
        ("ResNetForImageClassification", {}, {"classifier.1.weight", "classifier.1.bias"}),
        ("ViTModel", SMALL_VIT, {"pooler.dense.weight", "pooler.dense.bias"}),
        ("ViTForImageClassification", SMALL_VIT, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_a_folder_gives_what_transformers_gives(
    kind: str, settings: dict[str, Any], left_out: set[str], tmp_path: Path
) -> None:
    network = save(tmp_path, kind, settings, crop_pct=0.875)
    found = open_encoder(str(tmp_path))
    with torch.no_grad():
        expected = features(network, found.encoder.normalize(pixels()))
        torch.testing.assert_close(found.encoder(pixels()), expected, rtol=1e-5, atol=1e-5)
    assert set(found.left_out) == left_out
    assert found.encoder.crop == 0.875
    assert found.encoder.image_size == (224 if kind.startswith("ResNet") else 64)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(found.encoder.normalize(white)[0, :, 0, 0], torch.tensor([1.0, 1.2, 0.7 / 0.6]))


def test_a_whole_image_is_taken_where_no_crop_is_told(tmp_path: Path) -> None:
    save(tmp_path, "ViTModel", SMALL_VIT)
    assert open_encoder(str(tmp_path)).encoder.crop == 1.0


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 5}, "a width of 48 cannot be split into 5 heads"),
        ({"hidden_act": "relu"}, "has hidden_act 'relu', but what is built here has 'gelu'"),
        ({"num_hidden_layers": 3}, r"it lacks blocks\.2\.norm1\.weight"),
        ({"num_hidden_layers": 1}, r"it has more blocks\.1\."),
        ({"image_size": 32}, r"of other shapes are pos_embed \(1x17x48, not 1x5x48\)"),
        ({"model_type": "dinov2"}, "of transformers' dinov2, but of its networks only resnet and vit are known"),
    ],
)
def test_what_is_not_the_same_network_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    save(tmp_path, "ViTModel", SMALL_VIT)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=says):
        open_encoder(str(tmp_path))


def test_a_resnet_that_strides_elsewhere_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "ResNetModel", RESNET18 | {"downsample_in_first_stage": True})
    with pytest.raises(ValueError, match="has downsample_in_first_stage True"):
        open_encoder(str(tmp_path))


def test_unknown_normalization_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "ViTModel", SMALL_VIT)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="there is no image_mean or image_std"):
        open_encoder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"does not say how pixels are normalized: preprocessor_config\.json is missing"
    ):
        open_encoder(str(tmp_path))
