"""The step against a naive restatement of the paper's algorithm 1 for a world of several ranks, in one process."""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed
from moco_fast.config import ModelConfig, OptimConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.batchnorm import use_group_statistics
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.methods.shuffle import Exchange, Gather, Together, VirtualGroups
from moco_fast.optimizers.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch
from tests.batches import random_batch
from tests.leaks import NewTensors

MODEL = ModelConfig(encoder="resnet18_quarter", stem="cifar")
DIM = 8
OPTIM = OptimConfig(lr=0.02, weight_decay=1e-3)
TEMPERATURE = 0.2
MOMENTUM = 0.9
SIZE = 24
BATCH = 8
PERMUTATION = [3, 14, 7, 0, 9, 12, 5, 10, 1, 15, 6, 2, 13, 8, 4, 11]


def make_parts(num_groups=1, *, exact=False):
    torch.manual_seed(0)
    query = build_encoder(MODEL, MomentumContrast(dim=DIM))
    if num_groups > 1:
        use_group_statistics(query, num_groups)
    query.to(memory_format=torch.channels_last)
    if exact:
        # The same weights in float64, so that rounding cannot hide an error.
        query.double().register_forward_pre_hook(lambda _, images: images[0].double())
    # No multiple of the batch, so that the queue wraps in the middle of one.
    queue = Queue(DIM, 37, torch.Generator().manual_seed(1))
    return query, copy_as_key_encoder(query), queue.double() if exact else queue


def make_batch(step, rank):
    return random_batch(1000 * step + rank, BATCH, SIZE)


def make_step(policy, num_groups=1, wrap=lambda query: query, autocast=nullcontext, exact=False, num_passes=1):
    query, key, queue = make_parts(num_groups, exact=exact)
    optimizer = build_optimizer(query, OPTIM)
    keys = MomentumKeys(key, MomentumUpdate(query, key), policy, autocast)
    objective = Discrimination(keys=keys, dictionary=queue, temperature=TEMPERATURE, num_passes=num_passes)
    step = TrainStep(query=wrap(query), objective=objective, optimizer=optimizer, autocast=autocast)
    return SimpleNamespace(query=query, key=key, queue=queue, optimizer=optimizer, step=step)


def result_of(parts, watched):
    return {
        "query": {name: value.detach().clone() for name, value in parts.query.named_parameters()},
        "key": {name: value.clone() for name, value in parts.key.named_parameters()},
        "queue": parts.queue.keys.clone(),
        "watched": watched,
    }


def train_ranks(policy_name, num_steps, accumulate):
    policies = {
        "exchange": lambda: Exchange(None),
        "gather": lambda: Gather(lambda size, device: torch.tensor(PERMUTATION)),
        "none": Together,
    }

    def wrap(query):
        if not distributed.is_distributed():
            return query
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            return DistributedDataParallel(
                query, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=accumulate == 1
            )

    parts = make_step(policies[policy_name](), wrap=wrap, exact=True)
    watched = []
    for step in range(num_steps):
        batches = [make_batch(step * accumulate + i, distributed.rank()) for i in range(accumulate)]
        watched.append(parts.step(batches, lr=OPTIM.lr / (step + 1), scheduled={"momentum": MOMENTUM}))
    return result_of(parts, watched)


def naive_shuffle(policy_name, images, world_size):
    """Images by rank -> for each rank, (images that it computes keys of, [(owner, row)] of each)."""
    owners = {
        "none": [[(r, row) for row in range(BATCH)] for r in range(world_size)],
        "exchange": [
            [(s, r * BATCH // world_size + i) for s in range(world_size) for i in range(BATCH // world_size)]
            for r in range(world_size)
        ],
        "gather": [[divmod(place, BATCH) for place in PERMUTATION[BATCH * r : BATCH * r + BATCH]] for r in range(2)],
    }[policy_name]
    return [(torch.stack([images[owner][row] for owner, row in of_rank]), of_rank) for of_rank in owners]


def simulate(policy_name, num_steps, accumulate, world_size):
    """Algorithm 1 for all ranks in turn: gradients averaged over ranks and batches, loops for everything else."""
    query, key, queue = make_parts(exact=True)
    dictionary, position = queue.keys.clone(), 0
    velocity = {name: torch.zeros_like(p) for name, p in query.named_parameters()}
    losses = []
    for step in range(num_steps):
        with torch.no_grad():
            for name, k in key.named_parameters():
                k.copy_(MOMENTUM * k + (1 - MOMENTUM) * query.get_parameter(name))
        query.zero_grad()
        for micro in range(accumulate):
            batches = [make_batch(step * accumulate + micro, rank) for rank in range(world_size)]
            keys = torch.zeros(world_size, BATCH, DIM, dtype=torch.float64)
            for images, owners in naive_shuffle(policy_name, [batch.views[1] for batch in batches], world_size):
                with torch.no_grad():
                    for (owner, row), k in zip(owners, F.normalize(key(images)), strict=True):
                        keys[owner, row] = k
            for rank in range(world_size):
                queries = F.normalize(query(batches[rank].views[0]))
                logits = torch.cat([(queries * keys[rank]).sum(1, keepdim=True), queries @ dictionary.T], dim=1)
                loss = F.cross_entropy(logits / TEMPERATURE, torch.zeros(BATCH, dtype=torch.int64))
                (loss / world_size / accumulate).backward()
                losses.append(loss.item())
            for k in keys.flatten(0, 1):
                dictionary[position] = k
                position = (position + 1) % len(dictionary)
        with torch.no_grad():
            for name, p in query.named_parameters():
                velocity[name] = OPTIM.momentum * velocity[name] + p.grad + OPTIM.weight_decay * p
                p -= OPTIM.lr / (step + 1) * velocity[name]
    return dict(query.named_parameters()), dict(key.named_parameters()), dictionary, losses


@pytest.mark.parametrize(
    ("world_size", "policy_name", "accumulate"),
    [(1, "none", 1), (1, "none", 3), (2, "exchange", 1), (2, "gather", 1), (2, "exchange", 2), (4, "exchange", 1)],
)
def test_a_world_of_ranks_does_what_the_paper_says(run_ranks, world_size, policy_name, accumulate):
    num_steps = 3
    if world_size == 1:
        results = [train_ranks(policy_name, num_steps, accumulate)]
    else:
        results = run_ranks(train_ranks, policy_name, num_steps, accumulate, world_size=world_size)
    query, key, dictionary, losses = simulate(policy_name, num_steps, accumulate, world_size)
    for result in results:
        for name, expected in query.items():
            torch.testing.assert_close(result["query"][name], expected.detach(), rtol=1e-6, atol=1e-8, msg=name)
        for name, expected in key.items():
            torch.testing.assert_close(result["key"][name], expected, rtol=1e-6, atol=1e-8, msg=name)
        torch.testing.assert_close(result["queue"], dictionary, rtol=1e-6, atol=1e-8)
        assert torch.equal(result["queue"], results[0]["queue"]), "the queue differs between ranks"
    ours = sum(result["watched"][step]["loss"] for result in results for step in range(num_steps))
    assert ours.item() == pytest.approx(sum(losses) / accumulate, rel=1e-9)


def test_without_the_exchange_the_simulation_does_not_hold(run_ranks):
    # The comparison above must be able to tell the policies apart.
    query, *_ = simulate("exchange", 2, 1, 2)
    together = run_ranks(train_ranks, "none", 2, 1)[0]
    assert max((together["query"][name] - value).abs().max() for name, value in query.items()) > 1e-3


def count_averagings(accumulate):
    """Reductions of gradients over ranks in each of two steps."""
    count = 0

    def hook(group, bucket):
        nonlocal count
        count += 1
        return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(first)

    def first(future):
        return future.value()[0]

    def wrap(query):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            wrapped = DistributedDataParallel(query, broadcast_buffers=False)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    counts, parts = [], make_step(Together(), wrap=wrap)
    for step in range(2):
        batches = [make_batch(step * accumulate + i, distributed.rank()) for i in range(accumulate)]
        parts.step(batches, lr=OPTIM.lr, scheduled={"momentum": MOMENTUM})
        counts.append(count)
    return counts


def test_gradients_are_averaged_once_per_step_however_many_batches(run_ranks):
    # More often would give the same result, and cost as much again each time.
    once, *_ = run_ranks(count_averagings, 1)
    assert once[0] > 0
    assert run_ranks(count_averagings, 3) == [once, once]


def test_virtual_groups_on_one_rank_do_what_separate_ranks_would():
    # Two groups of a batch of 16 are two ranks with batches of 8, but for the queue's order.
    parts = make_step(VirtualGroups(2), num_groups=2)
    halves = [make_batch(0, rank) for rank in range(2)]
    merged = Batch(
        views=tuple(torch.cat(of_halves) for of_halves in zip(*(half.views for half in halves), strict=True)),
        index=torch.arange(16),
        label=torch.full((16,), -1),
    )
    watched = parts.step([merged], lr=OPTIM.lr, scheduled={"momentum": MOMENTUM})
    query, key, _ = make_parts()
    keys = torch.zeros(16, DIM)
    for group in range(2):
        dealt = [row for place in range(8 * group, 8 * group + 8) for row in [place // 2 + 8 * (place % 2)]]
        with torch.no_grad():
            keys[dealt] = F.normalize(key(merged.views[1][dealt]))
    queries = torch.cat([F.normalize(query(half.views[0])) for half in halves])
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ make_parts()[2].keys.T], dim=1)
    expected = F.cross_entropy(logits / TEMPERATURE, torch.zeros(16, dtype=torch.int64))
    assert watched["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_watched():
    parts = make_step(Together())
    before = copy.deepcopy(parts.query)
    batch = make_batch(0, 0)
    queue = parts.queue.keys.clone()
    watched = parts.step([batch], lr=0.1, scheduled={"momentum": MOMENTUM})
    queries = F.normalize(before(batch.views[0]))
    keys = parts.queue.keys[:BATCH]
    positives, negatives = (queries * keys).sum(1), queries @ queue.T
    assert watched.keys() == {
        *("loss", "accuracy", "similarity_positive", "similarity_negative", "feature_std", "grad_norm")
    }
    assert watched["similarity_positive"].item() == pytest.approx(positives.mean().item(), rel=1e-4)
    assert watched["similarity_negative"].item() == pytest.approx(negatives.mean().item(), rel=1e-3, abs=1e-5)
    assert watched["accuracy"].item() == pytest.approx((positives > negatives.amax(1)).float().mean().item())
    logits = torch.cat([positives[:, None], negatives], dim=1) / TEMPERATURE
    loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64))
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert watched["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
    assert all(value.ndim == 0 and not value.requires_grad for value in watched.values())


def test_the_probe_learns_from_the_first_view():
    parts, seen = make_step(Together(), num_passes=2), []
    probe = SimpleNamespace(step=lambda features, labels: seen.append(features) or torch.zeros(()))
    before, batch = copy.deepcopy(parts.query), make_batch(0, 0)
    replace(parts.step, probe=probe)([batch], lr=0.1, scheduled={"momentum": MOMENTUM})
    [found] = seen
    *_, expected = before(batch.views[0], with_features=True)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())


def test_a_saved_state_continues_bit_for_bit():
    parts, fresh = make_step(Together()), make_step(Together())
    for step in range(2):
        parts.step([make_batch(step, 0)], lr=0.1, scheduled={"momentum": MOMENTUM})
    for name in ("query", "key", "queue"):
        getattr(fresh, name).load_state_dict(copy.deepcopy(getattr(parts, name).state_dict()))
    load_optimizer_tensors(fresh.optimizer, fresh.query, optimizer_tensors(parts.optimizer, parts.query))
    for step in range(2, 4):
        ours, theirs = (
            each.step([make_batch(step, 0)], lr=0.1, scheduled={"momentum": MOMENTUM}) for each in (parts, fresh)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_half_precision_keeps_the_key_encoder_and_the_loss_in_float32():
    parts = make_step(Together(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    full = make_step(Together())
    watched, reference = (
        each.step([make_batch(0, 0)], lr=0.1, scheduled={"momentum": MOMENTUM}) for each in (parts, full)
    )
    assert {p.dtype for p in parts.key.parameters()} == {torch.float32}
    assert watched["loss"].dtype == torch.float32
    assert watched["loss"].item() == pytest.approx(reference["loss"].item(), rel=0.02)
    assert watched["loss"].item() != reference["loss"].item()


@pytest.mark.parametrize("num_passes", [1, 2])
def test_steps_leave_nothing_behind(num_passes):
    parts = make_step(Together(), num_passes=num_passes)
    alive, new = [], NewTensors()
    for step in range(5):
        parts.step([make_batch(step, 0)], lr=0.1, scheduled={"momentum": MOMENTUM})
        alive.append(new.count())
    # The first step has made what there is one of for good.
    assert len(set(alive[1:])) == 1, alive
