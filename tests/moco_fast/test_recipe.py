"""Parts of a training of backbone and classifier: optimizer groups, mixing, first weights."""

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import SGD, AdamW

from moco_fast.encoders.encoder import Encoder, build_backbone
from moco_fast.evaluation.classifier import build_classifier, randomize
from moco_fast.evaluation.recipes import Recipe, build_recipe_optimizer, loss_of, mix
from tests.moco_fast.trained_task import tiny_encoder


def small_vit(**options: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=32, **options)


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"lr": 0.1, "batch_size": 8, "epochs": 1, **options})


def groups_of(optimizer: Any, *modules: tuple[str, nn.Module]) -> dict[str, tuple[float, float]]:
    """Scale and weight decay of each parameter by its name."""
    names = {id(value): f"{prefix}{name}" for prefix, module in modules for name, value in module.named_parameters()}
    found = {
        names[id(value)]: (group["scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for value in group["params"]
    }
    assert len(found) == len(names)
    return found


# Optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_wise_decay_is_timm_s(decay: float) -> None:
    whole = small_vit(num_classes=6)
    spared = whole.no_weight_decay()
    names = {id(value): name for name, value in whole.named_parameters()}
    scales: dict[str, float] = {}
    decays: dict[str, float] = {}
    for group in param_groups_layer_decay(whole, 0.05, no_weight_decay_list=spared, layer_decay=decay):
        scales |= {names[id(value)]: group["lr_scale"] for value in group["params"]}
        decays |= {names[id(value)]: group["weight_decay"] for value in group["params"]}
    backbone, head = small_vit(num_classes=0), nn.Linear(24, 6)
    optimizer = build_recipe_optimizer(backbone, head, recipe(optimizer="adamw", weight_decay=0.05, layer_decay=decay))
    assert isinstance(optimizer, AdamW)
    found = groups_of(optimizer, ("", backbone), ("head.", head))
    assert {name: scale for name, (scale, _) in found.items()} == pytest.approx(scales)
    assert {name: decay for name, (_, decay) in found.items()} == decays


def test_sgd_decays_all_and_the_classifier_has_a_rate_of_its_own() -> None:
    encoder, head = tiny_encoder(), nn.Linear(12, 6)
    optimizer = build_recipe_optimizer(
        encoder.backbone, head, recipe(weight_decay=0.01, head_multiplier=10.0, nesterov=True)
    )
    found = groups_of(optimizer, ("", encoder.backbone), ("head.", head))
    assert {value for name, value in found.items() if name.startswith("head.")} == {(10.0, 0.01)}
    assert {value for name, value in found.items() if not name.startswith("head.")} == {(1.0, 0.01)}
    assert isinstance(optimizer, SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_a_backbone_without_layers_refuses_layer_wise_decay() -> None:
    with pytest.raises(ValueError, match=r"--layer-decay 0\.5 needs a network of timm's"):
        build_recipe_optimizer(tiny_encoder().backbone, nn.Linear(12, 6), recipe(layer_decay=0.5))


def test_a_warm_up_comes_before_the_cosine() -> None:
    rates = recipe(lr=1.0, warmup=0.2, min_lr=0.1)
    assert [rates.lr_at(step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])


# Mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_mixing_is_timm_s_with_the_same_draws(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    ours = mix(images, labels, recipe(label_smoothing=0.1, **options), num_classes=4, seed=(7, 1))
    rng = np.random.default_rng((7, 1))
    monkeypatch.setattr(np.random, "beta", rng.beta)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: rng.integers(low, high))
    monkeypatch.setattr(np.random, "rand", lambda: 0.0)
    alphas = {"mixup_alpha": options.get("mixup", 0.0), "cutmix_alpha": options.get("cutmix", 0.0)}
    theirs = Mixup(**alphas, label_smoothing=0.1, num_classes=4)
    expected, targets = theirs(images.float(), labels)
    torch.testing.assert_close(ours.images.float(), expected)
    torch.testing.assert_close(ours.targets, targets)
    assert not torch.equal(ours.images.float(), images.float())
    torch.testing.assert_close(ours.targets.sum(dim=1), torch.ones(6))


def test_both_ways_of_mixing_take_turns_by_the_draw() -> None:
    images, labels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)
    both = recipe(mixup=1.0, cutmix=1.0)
    mixed = [mix(images, labels, both, num_classes=4, seed=(0, step)) for step in range(40)]
    num_cut = sum(each.images.dtype == torch.uint8 for each in mixed)
    assert 10 < num_cut < 30
    again = mix(images, labels, both, num_classes=4, seed=(0, 5))
    assert torch.equal(again.images, mixed[5].images)
    plain = mix(images, labels, recipe(), num_classes=4, seed=(0, 0))
    assert plain.images is images
    assert plain.targets is labels


def test_labels_are_smoothed_once() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = recipe(label_smoothing=0.2)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(loss_of(logits, labels, smooth), expected)
    shares = nn.functional.one_hot(labels, 4) * 0.8 + 0.05
    torch.testing.assert_close(loss_of(logits, shares, smooth), expected)


def test_a_sample_in_place_of_a_damaged_one_has_no_part_in_the_loss() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, -1, 3, 0])
    kept = labels >= 0
    expected = nn.functional.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(loss_of(logits, labels, recipe()), expected)
    mixed = mix(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), labels, recipe(mixup=1.0), num_classes=4, seed=(0, 0))
    assert mixed.targets[2].sum() == 0  # the one in the middle is mixed with itself
    assert loss_of(logits, mixed.targets, recipe()).isfinite()


# The classifier --------------------------------------------------------------------------------------------------


def vit_encoder() -> Encoder:
    return Encoder(small_vit(num_classes=0), nn.Identity(), feature_dim=24, dim=24, image_size=32)


def test_a_classifier_trains_a_copy_with_all_its_parameters() -> None:
    encoder = vit_encoder()
    encoder.backbone.patch_embed.proj.requires_grad_(False)
    model = build_classifier(encoder, 6, seed=1, drop_path=0.2)
    assert all(value.requires_grad for value in model.parameters())
    assert not encoder.backbone.patch_embed.proj.weight.requires_grad
    assert [block.drop_path1.drop_prob for block in model.encoder.backbone.blocks] == [0, 0.1, 0.2]
    assert isinstance(encoder.backbone.blocks[2].drop_path1, nn.Identity)
    assert (0.005 < model.head.weight.std() < 0.02, model.head.bias.abs().max().item()) == (True, 0)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = model.head(encoder.eval().features(images, "backbone"))
    torch.testing.assert_close(model.eval()(images), expected)
    with pytest.raises(ValueError, match=r"--drop-path 0\.1 leaves out blocks"):
        build_classifier(tiny_encoder(), 6, seed=0, drop_path=0.1)


@pytest.mark.parametrize("name", ["resnet18_quarter", "vit"])
def test_random_weights_are_drawn_as_before_training_and_forget_what_was_learned(name: str) -> None:
    def build() -> Any:
        return small_vit(num_classes=0) if name == "vit" else build_backbone(name)

    torch.manual_seed(0)
    first, second, fresh = build(), build(), build()
    state = torch.get_rng_state()
    for each in (first, second):
        randomize(each, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for (key, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), key
        like = fresh.get_parameter(key)
        if like.numel() > 500:
            assert not torch.equal(one, like), key
            assert one.std().item() == pytest.approx(like.std().item(), rel=0.15), key
    for key, value in first.named_buffers():
        assert torch.equal(value, fresh.get_buffer(key)), key


@pytest.mark.parametrize("name", ["resnet18_quarter", "vit"])
def test_the_seed_that_a_network_was_built_with_draws_it_again(name: str) -> None:
    torch.manual_seed(0)
    built = small_vit(num_classes=0) if name == "vit" else build_backbone(name)
    other = copy.deepcopy(built)
    randomize(built, seed=0)
    randomize(other, seed=1)
    randomize(other, seed=0)
    for (key, one), (_, again) in zip(built.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, again), key


def test_what_no_one_knows_how_to_draw_is_refused_and_what_is_fixed_stays() -> None:
    backbone = tiny_encoder().backbone
    backbone[0].weight.requires_grad_(False)
    before = backbone[0].weight.detach().clone()
    randomize(backbone, seed=0)
    assert torch.equal(backbone[0].weight, before)
    backbone.register_parameter("scale", nn.Parameter(torch.full((3,), 0.1)))
    randomize(backbone, seed=1)
    assert backbone.get_parameter("scale").tolist() == torch.full((3,), 0.1).tolist()
    backbone.register_parameter("prompt", nn.Parameter(torch.randn(7)))
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(ValueError, match="nothing says how prompt begins"):
        randomize(backbone, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
