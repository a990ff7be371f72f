"""The presets against the authors' code, restated: how encoders are built and start, and MoCo v3's training.

moco: facebookresearch/moco at 3b42c2a, main_moco.py and moco/builder.py. moco-v3: facebookresearch/moco-v3 at c349e6e,
main_moco.py, moco/builder.py, moco/optimizer.py, vits.py and CONFIG.md. demo: moco at f736491,
colab/moco_cifar10_demo.ipynb.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import BasicBlock as TimmBlock
from torch import nn
from torchvision.models.resnet import BasicBlock

from moco_fast.encoders.encoder import ENCODERS, build_encoder, sine_cosine_positions
from moco_fast.methods.batchnorm import convert_batch_norm
from moco_fast.methods.dictionary import InBatch
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.shuffle import Together, build_policy
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.presets import PRESETS
from moco_fast.training.schedule import lr_at
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the authors build an encoder with; defaults are moco's."""

    arch: str = "resnet50"
    zero_init_residual: bool = False
    stop_grad_conv1: bool = False
    stem: str = "imagenet"
    head: str | None
    dim: int = 128
    mlp_dim: int | None = None
    normalize: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET


# moco: models.__dict__[arch](num_classes=dim); --mlp puts a hidden layer of the same width before the last one.
MOCO_V1, MOCO_V2 = Call(head="linear"), Call(head="mlp")
# moco-v3: partial(torchvision_models[arch], zero_init_residual=True), partial(vits[arch], stop_grad_conv1=...).
V3 = partial(Call, head=None, dim=256, mlp_dim=4096)
CALLS = {
    "moco-v1": MOCO_V1,
    "moco-v1-1b": MOCO_V1,
    "end-to-end": MOCO_V1,
    "memory-bank": MOCO_V1,
    "moco-v2": MOCO_V2,
    "moco-v2-symmetric": MOCO_V2,
    "moco-v2-multicrop": MOCO_V2,
    "moco-v3-resnet50": V3(zero_init_residual=True),
    "moco-v3-vit-small": V3(arch="vit_small", stop_grad_conv1=True),
    "moco-v3-vit-base": V3(arch="vit_base", stop_grad_conv1=True),
    # byol/byol_experiment.py and simsiam/builder.py; test_encoders.py holds the layers of their heads.
    "byol": Call(head=None, dim=256, mlp_dim=4096),
    "simsiam": Call(head=None, dim=2048, zero_init_residual=True),
    "cifar10": Call(arch="resnet18", stem="cifar", head="linear", normalize=CIFAR),
}


def test_every_preset_but_the_demo_has_its_call():
    assert CALLS.keys() == PRESETS.keys() - {"demo"}


@pytest.mark.parametrize("name", CALLS)
def test_every_preset_builds_its_encoder_with_the_authors_arguments(name):
    model, method, call = PRESETS[name][1].model, PRESETS[name][1].method, CALLS[name]
    assert (model.encoder, model.stem, method.dim) == (call.arch, call.stem, call.dim)
    assert getattr(method, "head", None) == call.head
    assert getattr(method, "mlp_dim", None) == call.mlp_dim
    assert model.zero_init_residual == call.zero_init_residual
    assert model.freeze_patch_projection == call.stop_grad_conv1
    assert (model.mean, model.std) == call.normalize


def authors_resnet(call):
    network = torchvision.models.get_model(call.arch, zero_init_residual=call.zero_init_residual)
    network.fc = nn.Identity()
    if call.stem == "cifar":  # the demo's ModelBase
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    return network


@pytest.mark.parametrize("name", ["moco-v2", "moco-v3-resnet50", "cifar10"])
def test_every_weight_of_a_resnet_starts_as_the_authors_network_does(name):
    preset = PRESETS[name][1]
    ours = build_encoder(preset.model, preset.method).backbone.state_dict()
    theirs = authors_resnet(CALLS[name]).state_dict()
    assert ours.keys() == theirs.keys()
    num_constant = 0
    for key, expected in theirs.items():
        assert ours[key].shape == expected.shape, key
        if (expected == expected.flatten()[0]).all():
            num_constant += 1
            assert torch.equal(ours[key], expected), key
        else:
            ratio = (ours[key].std() / expected.std()).item()
            assert ratio == pytest.approx(1, abs=5 / expected.numel() ** 0.5), key
            assert abs(ours[key].mean()) < 5 * expected.std() / expected.numel() ** 0.5, key
    assert num_constant > len(theirs) / 2
    zeros = [key for key, value in ours.items() if key.endswith("weight") and not value.any()]
    num_blocks = 16 if preset.model.encoder == "resnet50" else 8
    assert len(zeros) == (num_blocks if name == "moco-v3-resnet50" else 0)


@pytest.mark.parametrize(("name", "dim", "heads"), [("moco-v3-vit-small", 384, 12), ("moco-v3-vit-base", 768, 12)])
def test_every_weight_of_a_transformer_starts_as_vits_py_says(name, dim, heads):
    preset = PRESETS[name][1]
    vit = build_encoder(preset.model, preset.method).backbone
    assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size) == (12, dim, (16, 16))
    assert all(block.attn.num_heads == heads for block in vit.blocks)
    assert all(block.mlp.fc1.out_features == 4 * dim for block in vit.blocks)
    for key, layer in vit.named_modules():
        if isinstance(layer, nn.LayerNorm):
            assert layer.eps == 1e-6
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            fan_out = dim if key.endswith("qkv") else layer.weight.shape[0]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3), key
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), key
            assert (layer.bias == 0).all(), key
    assert vit.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    frozen = {key for key, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    positions = vit.pos_embed[0].numpy()
    assert (positions[0] == 0).all()
    np.testing.assert_allclose(positions[1:], naive_positions(14, dim), atol=1e-5)


def naive_positions(side, dim):
    """build_2d_sincos_position_embedding in float64. Its "w" is the first axis of the grid: the row of a patch."""
    found = np.zeros((side * side, dim))
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for channel in range(quarter):
                omega = 1 / 10000 ** (channel / quarter)
                values = np.sin(row * omega), np.cos(row * omega), np.sin(column * omega), np.cos(column * omega)
                found[row * side + column, channel::quarter] = values
    return found


def test_positions_of_a_grid_that_is_not_square_still_run_row_by_row():
    wide = sine_cosine_positions(2, 3, 8)
    assert torch.equal(wide[4], sine_cosine_positions(3, 3, 8)[4])
    assert wide.shape == (6, 8)


# The tiny recipe: all of moco-v3-resnet50, with ten layers in place of 50 and narrow heads.
NUM_STEPS, BATCH, DIM, MLP_DIM = 20, 8, 8, 16
V3_PRESET = PRESETS["moco-v3-resnet50"][1]
V3_TINY = replace(
    V3_PRESET,
    model=replace(V3_PRESET.model, encoder="resnet10"),
    method=replace(V3_PRESET.method, dim=DIM, mlp_dim=MLP_DIM),
)


def make_batch(step, batch=BATCH, side=32):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return Batch(views=tuple(views), index=torch.arange(batch), label=torch.full((batch,), -1))


def in_float64(preset, normalize):
    """The encoder of a recipe, from seed 0, with all of its numbers in float64."""
    torch.manual_seed(0)
    encoder = build_encoder(preset.model, preset.method).double()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalize)
    encoder.pixel_scale, encoder.pixel_shift = 1 / (255 * std), -mean / std
    return encoder


def normalized(view, normalize):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in normalize)
    return (view.double() / 255 - mean) / std


@pytest.fixture
def resnet10(monkeypatch):
    """A ResNet of ten layers, built as ENCODERS builds the others."""

    def build():
        return timm.models.ResNet(TimmBlock, (1, 1, 1, 1), num_classes=0, zero_init_last=False)

    monkeypatch.setitem(ENCODERS, "resnet10", build)


def our_training():
    """The parameters at the start, the losses, and the encoders after the last step; in float64."""
    query = in_float64(V3_TINY, IMAGENET)
    start = copy.deepcopy(query.state_dict())
    key = copy_as_key_encoder(query)
    method, optim = V3_TINY.method, V3_TINY.optim
    objective = Discrimination(
        keys=MomentumKeys(key, MomentumUpdate(query, key), Together(), nullcontext),
        dictionary=InBatch(),
        temperature=method.temperature,
        num_passes=method.backward_passes,
        loss_scale=method.loss_scale,
    )
    step = TrainStep(query=query, objective=objective, optimizer=build_optimizer(query, optim))
    losses = [
        step([make_batch(n)], lr=lr_at(n, NUM_STEPS, optim), scheduled=method.scheduled(n, NUM_STEPS))["loss"].item()
        for n in range(NUM_STEPS)
    ]
    return start, losses, query, key


def named(name):
    """Our name of a parameter of torchvision's network, whose classifier is the authors' head."""
    return f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"backbone.{name}"


class AuthorsV3:
    """moco-v3's MoCo_ResNet, LARS and schedules in float64 for one process, written from their definitions."""

    def __init__(self, start):
        def mlp(*widths, last_norm):
            layers = []
            for number, (width_in, width_out) in enumerate(pairwise(widths)):
                layers.append(nn.Linear(width_in, width_out, bias=False))
                if number < len(widths) - 2:
                    layers += [nn.BatchNorm1d(width_out), nn.ReLU()]
                elif last_norm:
                    layers.append(nn.BatchNorm1d(width_out, affine=False))
            return nn.Sequential(*layers)

        blocks = [1, 1, 1, 1]
        self.base = torchvision.models.ResNet(BasicBlock, blocks, zero_init_residual=True).double()
        self.base.fc = mlp(512, MLP_DIM, DIM, last_norm=True).double()
        self.predictor = mlp(DIM, MLP_DIM, DIM, last_norm=False).double()
        # What is drawn is ours; what is constant is as their constructors leave it.
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    parameter.copy_(start[name])
        self.momentum_base = copy.deepcopy(self.base)
        self.velocity = {}

    def named_parameters(self):
        for name, parameter in self.base.named_parameters():
            yield named(name), parameter
        for name, parameter in self.predictor.named_parameters():
            yield f"predictor.{name}", parameter

    def loss(self, queries, keys):
        """Each query's own key among those of the batch; the temperature is 1."""
        similarities = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
        return 2 * (similarities.logsumexp(1) - similarities.diagonal()).mean()

    def step(self, number):
        batch, epoch = make_batch(number), number / NUM_STEPS * 100  # of 100 epochs, 10 of them warm-up
        first, second = (normalized(view, IMAGENET) for view in batch.views)
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * epoch / 100)) * (1 - 0.99)
        queries = [self.predictor(self.base(images)) for images in (first, second)]
        with torch.no_grad():
            for slow, fast in zip(self.momentum_base.parameters(), self.base.parameters(), strict=True):
                slow.copy_(slow * momentum + fast * (1 - momentum))
            keys = [self.momentum_base(images) for images in (first, second)]
        loss = self.loss(queries[0], keys[1]) + self.loss(queries[1], keys[0])
        parameters = dict(self.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        peak = 0.6 * 4096 / 256
        lr = peak * epoch / 10 if epoch < 10 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 10) / 90))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                self.lars(name, parameter, gradient, lr)
        return loss.item()

    def lars(self, name, parameter, update, lr, decay=1e-6, trust=0.001, momentum=0.9):
        if parameter.ndim > 1:
            update = update + decay * parameter
            norms = parameter.norm().item(), update.norm().item()
            update = update * (trust * norms[0] / norms[1] if min(norms) > 0 else 1)
        self.velocity[name] = momentum * self.velocity.get(name, 0) + update
        parameter -= lr * self.velocity[name]


def largest_difference(ours, theirs):
    """Of any number of a parameter, as a share of the parameter's largest number; both have the same parameters."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - value).abs().max() / value.abs().max()).item() for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.usefixtures("resnet10")
def test_twenty_steps_of_v3_are_the_authors_with_their_start_and_their_lars():
    start, losses, query, key = our_training()
    authors = AuthorsV3(start)
    assert losses == pytest.approx([authors.step(number) for number in range(NUM_STEPS)], rel=1e-7)
    theirs = dict(authors.named_parameters())
    theirs_slow = {named(name): value for name, value in authors.momentum_base.named_parameters()}
    for ours, expected in ((query, theirs), (key, theirs_slow)):
        assert largest_difference(dict(ours.named_parameters()), expected) < 1e-6


# The tiny demo: all of cifar10, with ten layers in place of 18, two samples in each of the eight groups, a short queue.
DEMO_BATCH, DEMO_QUEUE, NUM_SPLITS = 16, 64, 8
CIFAR_PRESET = PRESETS["cifar10"][1]
CIFAR_TINY = replace(
    CIFAR_PRESET, model=replace(CIFAR_PRESET.model, encoder="resnet10"), method=replace(CIFAR_PRESET.method, dim=DIM)
)


class SplitBatchNorm(nn.BatchNorm2d):
    """The demo's: sample n is of group n mod 8; running statistics are the mean of the groups'."""

    def forward(self, inputs):
        outputs, means, variances = torch.empty_like(inputs), [], []
        for group in range(NUM_SPLITS):
            part = inputs[group::NUM_SPLITS]
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            outputs[group::NUM_SPLITS] = F.batch_norm(part, mean, variance, self.weight, self.bias, True, 0.1, 1e-5)
            means.append(mean)
            variances.append(variance)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return outputs


class AuthorsDemo:
    """The notebook's ModelMoCo and its SGD in float64. `order` says which of our samples is its n-th."""

    def __init__(self, start, queue):
        self.base = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=DIM, norm_layer=SplitBatchNorm)
        self.base.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.base.maxpool = nn.Identity()
        self.base.double()
        with torch.no_grad():
            for name, parameter in self.base.named_parameters():
                if parameter.ndim > 1 or name == "fc.bias":
                    parameter.copy_(start[named(name)])
        self.slow = copy.deepcopy(self.base)
        self.queue, self.pointer, self.velocity = queue.T.clone(), 0, {}

    def step(self, batch, order, permutation, lr=0.06, decay=5e-4):
        images = [normalized(view[order], CIFAR) for view in batch.views]
        queries = F.normalize(self.base(images[0]), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.base.parameters(), strict=True):
                slow.copy_(slow * 0.99 + fast * (1 - 0.99))
            keys = F.normalize(self.slow(images[1][permutation]), dim=1)[permutation.argsort()]
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()], dim=1) / 0.1
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % DEMO_QUEUE
        parameters = dict(self.base.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                self.velocity[name] = 0.9 * self.velocity.get(name, 0) + gradient + decay * parameter
                parameter -= lr * self.velocity[name]
        return loss.item()


@pytest.mark.usefixtures("resnet10")
def test_steps_of_cifar10_are_the_demos_for_the_same_groups_and_permutation():
    query = in_float64(CIFAR_TINY, CIFAR)
    start = copy.deepcopy(query.state_dict())
    convert_batch_norm(query, CIFAR_TINY.bn)
    key = copy_as_key_encoder(query)
    queue = Queue(DIM, DEMO_QUEUE, torch.Generator().manual_seed(0)).double()
    authors = AuthorsDemo(start, queue.keys)
    policy = build_policy(CIFAR_TINY.bn, batch_size=DEMO_BATCH, local_world_size=1)
    method, optim = CIFAR_TINY.method, CIFAR_TINY.optim
    objective = Discrimination(
        keys=MomentumKeys(key, MomentumUpdate(query, key), policy, nullcontext),
        dictionary=queue,
        temperature=method.temperature,
    )
    step = TrainStep(query=query, objective=objective, optimizer=build_optimizer(query, optim))
    # Our groups are neighbors; in this order they are the demo's, and our way to deal keys out is this permutation.
    order = torch.arange(DEMO_BATCH).view(NUM_SPLITS, -1).T.flatten()
    for number in range(6):
        batch = make_batch(number, DEMO_BATCH, 16)
        loss = step([batch], lr=optim.lr, scheduled=method.scheduled(number, 6))["loss"].item()
        assert loss == pytest.approx(authors.step(batch, order, order), rel=1e-9)
    for ours, theirs in ((query, authors.base), (key, authors.slow)):
        expected = {named(name): value for name, value in theirs.named_parameters()}
        assert largest_difference(dict(ours.named_parameters()), expected) < 1e-8
    for name, buffer in authors.base.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(query.state_dict()[f"backbone.{name}"], buffer, rtol=1e-9, atol=1e-12)
