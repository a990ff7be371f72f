import copy

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import ENCODERS, build_encoder, check_image_size
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam

PAPER_MILLIONS = {"resnet50": 24, "resnext50_32x8d": 46, "resnet50_w2x": 94, "resnet50_w4x": 375}


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_parameter_counts_are_the_papers(name, millions):
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(head="linear"))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert abs(count / 1e6 - millions) < 0.5 + 0.005 * millions


@pytest.mark.parametrize(
    "name", [*(name for name in ENCODERS if name not in PAPER_MILLIONS), "resnet26", "convnext_atto"]
)
def test_output_shapes(name):
    encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(dim=16))
    size = 224 if name.startswith("vit") else 64
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    assert encoder.features(images, "backbone").shape == (2, encoder.feature_dim)
    assert encoder(images).shape == encoder.features(images, "head").shape == (2, 16)
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"backbone", "head"}


def test_narrow_resnets_have_the_layout_of_resnet18():
    def layout(name, factor):
        backbone = ENCODERS[name]()
        layers = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        return [
            (tuple(p * factor for p in w.shape[:2]), w.shape[2:])
            for w in nn.Sequential(*layers).parameters()
            if w.ndim == 4
        ]

    # The first block's projection exists only where the widths differ, so it must not appear in the narrow ones either.
    assert layout("resnet18_quarter", 4) == layout("resnet18_half", 2) == layout("resnet18", 1)


def test_cifar_stem_keeps_the_resolution():
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast())
    backbone = encoder.backbone
    stem = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(torch.zeros(2, 3, 32, 32)))))
    assert stem.shape == (2, 16, 32, 32)


def test_linear_head_is_one_layer_and_mlp_head_is_the_v2_one():
    linear = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(head="linear", dim=7)).head
    assert isinstance(linear, nn.Linear)
    assert linear.weight.shape == (7, 128)
    mlp = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast(head="mlp", dim=7)).head
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [mlp[0].weight.shape, mlp[2].weight.shape] == [(128, 128), (7, 128)]


@pytest.mark.parametrize("name", ["resnet18_quarter", "resnet18"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_every_parameter_is_initialized_as_the_authors_are(name, stem):
    encoder = build_encoder(ModelConfig(encoder=name, stem=stem), MomentumContrast())
    for layer_name, layer in encoder.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            # timm's own default would set the last scale of a block to zero.
            assert (layer.weight == 1).all(), layer_name
            assert (layer.bias == 0).all(), layer_name
        elif isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * np.prod(layer.kernel_size)
            expected = (2 / fan_out) ** 0.5
            if layer.in_channels == 3 and stem == "cifar":
                expected = 1 / (3 * 27) ** 0.5  # torch's default: uniform in +-1/sqrt(fan_in)
            assert abs(layer.weight.std().item() / expected - 1) < 0.2, layer_name
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ["resnet18_quarter", "resnet26", "vit_tiny_patch16_224", "vit_small"])
def test_no_parameter_is_left_as_memory_held_it(monkeypatch, name):
    made = []

    def poisoned(self, data=None, requires_grad=True):
        parameter = original(self, data, requires_grad)
        if data is not None and data.is_floating_point():
            with torch.no_grad():
                parameter.fill_(float("nan"))
        made.append(parameter)
        return parameter

    original = nn.Parameter.__new__
    monkeypatch.setattr(nn.Parameter, "__new__", poisoned)
    encoder = build_encoder(ModelConfig(encoder=name), MomentumContrastV3(mlp_dim=8))
    assert len(made) >= len(list(encoder.parameters()))
    left = [key for key, parameter in encoder.named_parameters() if not parameter.isfinite().all()]
    assert not left


def layers_of(module):
    def describe(layer):
        if isinstance(layer, nn.Linear):
            return f"{layer.in_features}-{layer.out_features}{'' if layer.bias is None else ' with bias'}"
        if isinstance(layer, nn.BatchNorm1d):
            return f"norm {layer.num_features}{'' if layer.affine else ' without scale'}"
        return type(layer).__name__

    return [describe(layer) for layer in module]


def test_v3_heads_are_the_authors():
    method = MomentumContrastV3(dim=8, mlp_dim=16)
    resnet = build_encoder(ModelConfig(encoder="resnet18_quarter"), method)
    assert layers_of(resnet.head) == ["128-16", "norm 16", "ReLU", "16-8", "norm 8 without scale"]
    assert layers_of(resnet.predictor) == ["8-16", "norm 16", "ReLU", "16-8"]
    vit = build_encoder(ModelConfig(encoder="vit_tiny_patch16_224"), method)
    hidden = ["norm 16", "ReLU"]
    assert layers_of(vit.head) == ["192-16", *hidden, "16-16", *hidden, "16-8", "norm 8 without scale"]
    assert layers_of(vit.predictor) == ["8-16", *hidden, "16-8", "norm 8 without scale"]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = resnet.predictor(resnet.features(images, "head"))
    torch.testing.assert_close(resnet(images), expected)
    assert "predictor.0.weight" in resnet.state_dict()


def test_heads_of_methods_that_predict_are_the_authors():
    # byol/utils/networks.py: biases before a batch norm, none behind.
    byol = build_encoder(ModelConfig(encoder="resnet18_quarter"), Byol(dim=8, mlp_dim=16))
    assert layers_of(byol.head) == ["128-16 with bias", "norm 16", "ReLU", "16-8"]
    assert layers_of(byol.predictor) == ["8-16 with bias", "norm 16", "ReLU", "16-8"]
    # simsiam/builder.py: the last linear layer of the projector has a bias that is not trained, before a batch norm.
    simsiam = build_encoder(ModelConfig(encoder="resnet18_quarter"), SimSiam(dim=8, predictor_dim=4))
    hidden = ["norm 128", "ReLU"]
    assert layers_of(simsiam.head) == ["128-128", *hidden, "128-128", *hidden, "128-8", "norm 8 without scale"]
    assert layers_of(simsiam.predictor) == ["8-4", "norm 4", "ReLU", "4-8 with bias"]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    predicted, projected = simsiam.eval()(images, with_projection=True)
    assert torch.equal(projected, simsiam.features(images, "head"))
    assert torch.equal(predicted, simsiam.predictor(projected))


def test_zero_init_residual_changes_the_last_scales_alone_and_no_other_number():
    def build(**options):
        torch.manual_seed(0)
        return build_encoder(ModelConfig(encoder="resnet18_quarter", **options), MomentumContrast()).state_dict()

    plain, zeroed = build(), build(zero_init_residual=True)
    changed = [key for key in plain if not torch.equal(plain[key], zeroed[key])]
    assert changed == [f"backbone.layer{layer}.{block}.bn2.weight" for layer in range(1, 5) for block in range(2)]
    assert not any(zeroed[key].any() for key in changed)
    for name in ("vit_small", "convnext_atto"):
        with pytest.raises(ValueError, match="no last scale to set to zero"):
            build_encoder(ModelConfig(encoder=name, zero_init_residual=True), MomentumContrast())


def test_the_patch_projection_can_be_frozen():
    vit = build_encoder(ModelConfig(encoder="vit_tiny_patch16_224", freeze_patch_projection=True), MomentumContrast())
    frozen = {name for name, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    with pytest.raises(ValueError, match="not a vision transformer"):
        build_encoder(ModelConfig(encoder="resnet18", freeze_patch_projection=True), MomentumContrast())


def test_images_of_a_size_that_a_transformer_has_no_positions_for_are_refused():
    vit, resnet = (
        build_encoder(ModelConfig(encoder=name), MomentumContrast())
        for name in ("vit_tiny_patch16_224", "resnet18_quarter")
    )
    before = torch.get_rng_state()
    check_image_size(vit, "vit_tiny_patch16_224", 224)
    check_image_size(resnet, "resnet18_quarter", 96)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"positions for images of 224 pixels alone, but --views\.size is 96"):
        check_image_size(vit, "vit_tiny_patch16_224", 96)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_small", 96), ("vit_tiny_patch16_224", 64), ("swin_tiny_patch4_window7_224", 64)]
)
def test_transformers_are_built_for_the_size_of_the_images(name, size):
    encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(dim=16), image_size=size)
    check_image_size(encoder, name, size)
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    assert encoder.features(images, "backbone").shape == (2, encoder.feature_dim)


@pytest.mark.parametrize(("name", "size"), [("crossvit_tiny_240", 64), ("inception_v3", 64), ("halonet_h1", 64)])
def test_images_that_a_network_of_timms_cannot_take_are_refused(name, size):
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(encoder=name), MomentumContrast(), image_size=size)
    with pytest.raises(ValueError, match=rf"{name}' cannot take images of 64 pixels .* timm has it for \d+$"):
        check_image_size(encoder, name, size)


def test_a_name_of_pretrained_weights_is_refused():
    way_out = r"use 'resnet50', .*--run\.init-from timm:resnet50\.a1_in1k"
    with pytest.raises(ValueError, match=rf"'resnet50\.a1_in1k' names pretrained weights.*{way_out}"):
        build_encoder(ModelConfig(encoder="resnet50.a1_in1k"), MomentumContrast())


def test_a_network_whose_pooled_features_are_wider_than_its_last_map():
    encoder = build_encoder(ModelConfig(encoder="mobilenetv3_small_050"), MomentumContrast(dim=16), image_size=32)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert encoder.features(images, "backbone").shape == (2, encoder.feature_dim) == (2, 1024)
    encoder(images).sum().backward()


def test_same_seed_same_weights():
    def build(seed):
        torch.manual_seed(seed)
        return build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast()).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_an_encoder_can_be_copied():
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter"), MomentumContrast())
    assert copy.deepcopy(encoder).dim == encoder.dim


def test_unknown_encoder_is_told_with_near_names():
    with pytest.raises(ValueError, match=r"'resnet5' is unknown.*did you mean"):
        build_encoder(ModelConfig(encoder="resnet5"), MomentumContrast())
    with pytest.raises(ValueError, match=r"'frobnicate' is unknown.*resnet50_w2x"):
        build_encoder(ModelConfig(encoder="frobnicate"), MomentumContrast())
    with pytest.raises(ValueError, match="no CIFAR stem"):
        build_encoder(ModelConfig(encoder="convnext_atto", stem="cifar"), MomentumContrast())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalized_by_the_recipes_mean_and_std(memory_format):
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8).contiguous(memory_format=memory_format)
    expected = (images.numpy().transpose(0, 2, 3, 1) / 255 - np.array(mean)) / np.array(std)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter", mean=mean, std=std), MomentumContrast())
    values = encoder.normalize(images)
    assert values.dtype == torch.float32
    assert values.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(values.numpy().transpose(0, 2, 3, 1), expected, atol=1e-6)
    encoder.eval()
    features = encoder.backbone(values)
    assert torch.equal(encoder.features(images, "backbone"), features)
    assert torch.equal(encoder.features(images, "head"), encoder.head(features))
    assert torch.equal(encoder(images), encoder.head(features))
    assert not any("pixel" in name for name in encoder.state_dict())
