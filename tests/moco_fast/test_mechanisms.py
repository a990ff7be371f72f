"""The papers' other mechanisms, each in a world of ranks against a naive restatement in one process."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed
from moco_fast.config import ModelConfig, OptimConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.batchnorm import batch_norm_over_ranks, use_statistics_of_all_ranks
from moco_fast.methods.dictionary import Bank, InBatch
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import BankKeys, MomentumKeys, QueryKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.shuffle import Exchange, Together
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.training.step import TrainStep
from tests.batches import random_batch

BATCH = 8
TEMPERATURE = 0.5
LR = 0.02
MOMENTUM = 0.9
NUM_STEPS = 2
CLIP_NORM = 0.5


def make_batch(step, rank):
    return random_batch(1000 * step + rank, BATCH, 24, first=BATCH * (2 * step + rank))


def make_query(head):
    torch.manual_seed(0)
    method = MomentumContrastV3(dim=8, mlp_dim=16) if head == "v3" else MomentumContrast(head=head, dim=8)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), method)
    query.double().register_forward_pre_hook(lambda _, images: images[0].double())  # so that rounding hides no error
    return query.to(memory_format=torch.channels_last)


def make_queue():
    return Queue(8, 37, torch.Generator().manual_seed(1)).double()


def make_bank():
    return Bank(8, 64, torch.Generator().manual_seed(1), num_negatives=16, momentum=0.5).double()


def train(mechanism):
    """What a rank has after some steps of a mechanism: parameters of the query encoder, the dictionary, losses."""
    query = make_query("v3" if mechanism == "v3" else "mlp")
    if mechanism == "v3":
        use_statistics_of_all_ranks(query)
    policy = Exchange(None) if distributed.is_distributed() and mechanism != "v3" else Together()
    wrapped = query
    if distributed.is_distributed():
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            wrapped = DistributedDataParallel(query, broadcast_buffers=False)
    dictionary = {"symmetric": make_queue, "bank": make_bank}.get(mechanism, InBatch)()
    if mechanism == "bank":
        keys = BankKeys(dictionary)
    elif mechanism == "end-to-end":
        keys = QueryKeys(policy)
    else:
        key = copy_as_key_encoder(query)
        keys = MomentumKeys(key, MomentumUpdate(query, key), policy, torch.enable_grad)
    objective = Discrimination(
        keys=keys,
        dictionary=dictionary,
        temperature=TEMPERATURE,
        num_passes=2 if mechanism in ("symmetric", "v3") else 1,
        loss_scale=2 * TEMPERATURE if mechanism == "v3" else 1.0,
    )
    step = TrainStep(
        query=wrapped,
        objective=objective,
        optimizer=build_optimizer(query, OptimConfig(momentum=0.0, weight_decay=0.0)),
        clip_norm=CLIP_NORM,
    )
    torch.manual_seed(7)
    watched = [
        step([make_batch(n, distributed.rank())], lr=LR, scheduled={"momentum": MOMENTUM}) for n in range(NUM_STEPS)
    ]
    return SimpleNamespace(
        query={name: value.detach().clone() for name, value in query.named_parameters()},
        dictionary=dictionary.state_dict().get("keys"),
        losses=[each["loss"].item() for each in watched],
        grad_norms=[each["grad_norm"].item() for each in watched],
    )


def cross_entropy(queries, own, others):
    """Mean over queries of the paper's equation 1, with other candidates (one list of keys for each query)."""
    losses = []
    for q, k, negatives in zip(queries, own, others, strict=True):
        logits = torch.cat([(q @ k)[None], negatives @ q]) / TEMPERATURE
        losses.append(logits.logsumexp(0) - logits[0])
    return torch.stack(losses).mean()


def encode(encoder, images_by_rank, *, exchanged=False, together=False):
    """Unit vectors (W, B, D) of each rank's images, under the policy's batch statistics."""
    world_size = len(images_by_rank)
    if together:
        return F.normalize(encoder(torch.cat(images_by_rank))).view(world_size, BATCH, -1)
    if not exchanged:
        return torch.stack([F.normalize(encoder(images)) for images in images_by_rank])
    parts = [images.chunk(world_size) for images in images_by_rank]
    seen = [encoder(torch.cat([parts[s][r] for s in range(world_size)])) for r in range(world_size)]
    back = [torch.cat([seen[r].chunk(world_size)[s] for r in range(world_size)]) for s in range(world_size)]
    return torch.stack([F.normalize(rows) for rows in back])


def all_but(keys, row):
    return torch.cat([keys[:row], keys[row + 1 :]])


class Simulation:
    """All ranks in turn, in float64, with the plainest code for every mechanism."""

    def __init__(self, mechanism, world_size):
        self.mechanism, self.world_size = mechanism, world_size
        self.query = make_query("v3" if mechanism == "v3" else "mlp")
        self.key = copy_as_key_encoder(self.query)
        self.queue = make_queue().keys.clone()
        self.bank = make_bank().keys.clone()

    def losses_of_direction(self, views_q, views_k, index):
        """The loss of each rank, and the keys."""
        ranks, v3 = range(self.world_size), self.mechanism == "v3"
        queries = encode(self.query, views_q, together=v3)
        if self.mechanism == "bank":
            draw = self.bank[torch.randint(64, (16,))]
            own = self.bank[index].view(self.world_size, BATCH, -1)
            losses = [cross_entropy(queries[r], own[r], [draw] * BATCH) for r in ranks]
            moved = F.normalize(0.5 * self.bank[index] + 0.5 * queries.detach().flatten(0, 1))
            self.bank[index] = moved
            return losses, None
        if self.mechanism == "end-to-end":
            keys = encode(self.query, views_k, exchanged=self.world_size > 1)
        else:
            with torch.no_grad():
                keys = encode(self.key, views_k, exchanged=self.world_size > 1 and not v3, together=v3)
        if self.mechanism == "symmetric":
            return [cross_entropy(queries[r], keys[r], [self.queue] * BATCH) for r in ranks], keys
        flat = keys.flatten(0, 1)
        others = [[all_but(flat, r * BATCH + row) for row in range(BATCH)] for r in ranks]
        return [cross_entropy(queries[r], keys[r], others[r]) for r in ranks], keys

    def step(self, number, position):
        with torch.no_grad():
            for name, k in self.key.named_parameters():
                k.copy_(MOMENTUM * k + (1 - MOMENTUM) * self.query.get_parameter(name))
        batches = [make_batch(number, rank) for rank in range(self.world_size)]
        views = [[batch.views[0] for batch in batches], [batch.views[1] for batch in batches]]
        index = torch.cat([batch.index for batch in batches])
        directions = [views, views[::-1]] if self.mechanism in ("symmetric", "v3") else [views]
        outcomes = [self.losses_of_direction(*direction, index) for direction in directions]
        scale = 2 * TEMPERATURE if self.mechanism == "v3" else 1
        by_rank = [scale * sum(losses[r] for losses, _ in outcomes) for r in range(self.world_size)]
        self.query.zero_grad()
        (sum(by_rank) / self.world_size).backward()
        norm = torch.cat([p.grad.flatten() for p in self.query.parameters()]).norm()
        with torch.no_grad():
            for p in self.query.parameters():
                p -= LR * p.grad * min(1, CLIP_NORM / norm)
            if self.mechanism == "symmetric":
                for key in torch.cat([keys.flatten(0, 1) for _, keys in outcomes]):
                    self.queue[position] = key
                    position = (position + 1) % len(self.queue)
        return [loss.item() for loss in by_rank], norm.item(), position


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mechanism", ["symmetric", "v3", "end-to-end", "bank"])
def test_each_mechanism_does_what_its_paper_says(run_ranks, mechanism, world_size):
    results = [train(mechanism)] if world_size == 1 else run_ranks(train, mechanism)
    simulation, position = Simulation(mechanism, world_size), 0
    torch.manual_seed(7)
    for number in range(NUM_STEPS):
        losses, norm, position = simulation.step(number, position)
        assert [result.losses[number] for result in results] == pytest.approx(losses, rel=1e-9)
        assert [result.grad_norms[number] for result in results] == pytest.approx([norm] * world_size, rel=1e-8)
        assert norm > CLIP_NORM, "the test would not see clipping"
    for result in results:
        for name, expected in simulation.query.named_parameters():
            torch.testing.assert_close(result.query[name], expected.detach(), rtol=1e-6, atol=1e-8, msg=name)
        if mechanism in ("symmetric", "bank"):
            expected = simulation.queue if mechanism == "symmetric" else simulation.bank
            torch.testing.assert_close(result.dictionary, expected, rtol=1e-6, atol=1e-8)


LAYERS = {
    "1d": lambda: nn.BatchNorm1d(3),
    "2d": lambda: nn.BatchNorm2d(3),
    "2d bare": lambda: nn.BatchNorm2d(3, affine=False),
}


def inputs_of(kind, rank):
    shape = (4, 3) if kind == "1d" else (4, 3, 5, 2)
    generator = torch.Generator().manual_seed(rank)
    return 2 * torch.randn(shape, generator=generator) + rank, torch.randn(shape, generator=generator)


def synchronized(kind):
    layer = LAYERS[kind]()
    inputs, grads = inputs_of(kind, distributed.rank())
    inputs.requires_grad_()
    outputs = batch_norm_over_ranks(layer, inputs)
    outputs.backward(grads)
    return outputs.detach(), inputs.grad, [p.grad for p in layer.parameters()], dict(layer.named_buffers())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_synchronized_batch_norm_is_that_of_the_whole_batch(run_ranks, kind, world_size):
    layer = LAYERS[kind]()
    inputs, grads = (torch.cat(parts) for parts in zip(*(inputs_of(kind, r) for r in range(world_size)), strict=True))
    inputs.requires_grad_()
    outputs = layer(inputs)
    outputs.backward(grads)
    results = run_ranks(synchronized, kind, world_size=world_size)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), outputs.detach())
    torch.testing.assert_close(torch.cat([result[1] for result in results]), inputs.grad, rtol=1e-4, atol=1e-5)
    for number, parameter in enumerate(layer.parameters()):
        # DistributedDataParallel adds the ranks' parts.
        torch.testing.assert_close(sum(result[2][number] for result in results), parameter.grad, rtol=1e-4, atol=1e-5)
    for result in results:
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(result[3][name], buffer)


def test_synchronized_batch_norm_in_one_process_is_float64_numpys():
    layer = nn.BatchNorm2d(3)
    layer.weight.data.uniform_(0.5, 2)
    inputs, _ = inputs_of("2d", 1)
    values = inputs.numpy().astype(np.float64)
    mean, variance = values.mean((0, 2, 3), keepdims=True), values.var((0, 2, 3), keepdims=True)
    expected = (values - mean) / np.sqrt(variance + 1e-5) * layer.weight.detach().numpy()[:, None, None]
    np.testing.assert_allclose(batch_norm_over_ranks(layer, inputs).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
