"""BYOL and SimSiam in a world of ranks against a naive restatement in one process, in float64.

byol: byol/byol_experiment.py at 4822a45 of google-deepmind/deepmind-research. simsiam: main_simsiam.py at 39ac33e of
facebookresearch/simsiam.
"""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed
from moco_fast.config import ModelConfig, OptimConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.methods.prediction import Byol, SimSiam
from moco_fast.methods.shuffle import Together
from moco_fast.optimizers.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from moco_fast.training.schedule import lr_at
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch

BATCH, NUM_STEPS = 8, 4
METHODS = {
    "byol": Byol(dim=8, mlp_dim=16, momentum=0.5),
    "simsiam": SimSiam(dim=8, predictor_dim=4),
}
OPTIM = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-3)


def make_views(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    views = torch.randint(0, 256, (2, BATCH, 3, 24, 24), dtype=torch.uint8, generator=generator)
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def make_query(method):
    torch.manual_seed(0)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), method)
    query.double().register_forward_pre_hook(lambda _, images: images[0].double())  # so that rounding hides no error
    return query.to(memory_format=torch.channels_last)


def setting(query):
    return Setting(
        query=query,
        policy=Together(),
        num_samples=100,
        seed=0,
        device=torch.device("cpu"),
        available_bytes=1 << 30,
    )


def make_parts(method):
    query = make_query(method)
    wrapped = query
    if distributed.is_distributed():
        use_statistics_of_all_ranks(query)
    objective = method.build(setting(query))
    if distributed.is_distributed():
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            static = method.backward_passes == 1
            wrapped = DistributedDataParallel(query, broadcast_buffers=False, static_graph=static)
    optimizer = build_optimizer(query, OPTIM, constant_lr=method.constant_lr)
    step = TrainStep(query=wrapped, objective=objective, optimizer=optimizer)
    return SimpleNamespace(query=query, objective=objective, optimizer=optimizer, step=step)


def take(parts, method, number):
    view_q, view_k = make_views(number, distributed.rank())
    none = torch.full((BATCH,), -1)
    batch = Batch(views=(view_q, view_k), index=none, label=none)
    return parts.step([batch], lr=lr_at(number, NUM_STEPS, OPTIM), scheduled=method.scheduled(number, NUM_STEPS))


def parameters(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def train(name):
    """What a rank has after some steps: parameters of both networks, and what it watched."""
    method = METHODS[name]
    parts = make_parts(method)
    watched = [{key: value.item() for key, value in take(parts, method, n).items()} for n in range(NUM_STEPS)]
    targets = parts.objective.modules.get("key")
    return parameters(parts.query), {} if targets is None else parameters(targets), watched


def unit(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def byol_losses(predictions, projections):
    """regression_loss of both directions, a number for each sample."""
    return [((unit(p) - unit(z)) ** 2).sum(1) for p, z in zip(predictions, reversed(projections), strict=True)]


def simsiam_losses(predictions, projections):
    cosines = [(unit(p) * unit(z)).sum(1) for p, z in zip(predictions, reversed(projections), strict=True)]
    return [-0.5 * cosine for cosine in cosines]


class Simulation:
    """All ranks as one batch, by the authors' definitions: they synchronize batch statistics."""

    def __init__(self, name):
        self.name, self.query = name, make_query(METHODS[name])
        self.target = copy.deepcopy(self.query)
        self.velocity = {}

    def step(self, number, world_size):
        views = [
            torch.cat(of_ranks) for of_ranks in zip(*(make_views(number, r) for r in range(world_size)), strict=True)
        ]
        projections = [self.query.features(view.double(), "head") for view in views]
        predictions = [self.query.predictor(projection) for projection in projections]
        if self.name == "byol":
            with torch.no_grad():
                projections = [self.target.features(view.double(), "head") for view in views]
        projections = [projection.detach() for projection in projections]
        losses = sum((byol_losses if self.name == "byol" else simsiam_losses)(predictions, projections))
        self.query.zero_grad()
        losses.mean().backward()
        cosine = sum((unit(p) * unit(z)).sum(1) for p, z in zip(predictions, projections[::-1], strict=True)) / 2
        before = parameters(self.target)
        self.update(number)
        return losses.detach().view(world_size, BATCH).mean(1), cosine.detach().view(world_size, BATCH).mean(1), before

    @torch.no_grad()
    def update(self, number):
        decay = 0.5 * (1 + math.cos(math.pi * number / NUM_STEPS))
        for name, p in self.query.named_parameters():
            self.velocity[name] = 0.9 * self.velocity.get(name, 0) + p.grad + 1e-3 * p
            is_fixed = self.name == "simsiam" and name.startswith("predictor.")  # --fix-pred-lr
            p -= (0.05 if is_fixed else 0.05 * decay) * self.velocity[name]
        tau = 1 - (1 - 0.5) * decay
        for name, target in self.target.named_parameters():
            target.copy_(target + (1 - tau) * (self.query.get_parameter(name) - target))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_each_does_what_its_authors_do(run_ranks, name, world_size):
    results = [train(name)] if world_size == 1 else run_ranks(train, name)
    simulation = Simulation(name)
    for number in range(NUM_STEPS):
        losses, cosines, target = simulation.step(number, world_size)
        assert [watched[number]["loss"] for *_, watched in results] == pytest.approx(losses.tolist(), rel=1e-8)
        assert [watched[number]["cosine"] for *_, watched in results] == pytest.approx(cosines.tolist(), rel=1e-7)
    for query, key, watched in results:
        for parameter, expected in simulation.query.named_parameters():
            torch.testing.assert_close(query[parameter], expected.detach(), rtol=1e-6, atol=1e-8, msg=parameter)
        # Ours moves before a step, the authors' after it: the one that the last step compared with.
        assert bool(key) == (name == "byol")
        for parameter, value in key.items():
            torch.testing.assert_close(value, target[parameter], rtol=1e-6, atol=1e-8, msg=parameter)
        assert watched[0].keys() == {"loss", "cosine", "feature_std", "grad_norm"}
        assert all(0 < each["feature_std"] < 8**-0.5 + 1e-9 for each in watched)


@pytest.mark.parametrize("name", METHODS)
def test_orthogonal_predictions_have_the_loss_that_the_report_calls_unrelated(name):
    method = METHODS[name]
    objective = method.build(setting(make_query(method)))
    rows = torch.eye(8)

    class Encode:
        def __call__(self, images):
            return rows.roll(1, 0)

        def with_projection(self, images):
            return rows.roll(1, 0), rows

    if name == "byol":
        object.__setattr__(objective, "targets", lambda *_: rows)
    losses = [made.loss for made in objective.passes(Encode(), (rows, rows), None)]
    assert sum(losses).item() == pytest.approx(method.charts(16)[0].level.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_state_continues_bit_for_bit(name):
    method = METHODS[name]
    parts, fresh = make_parts(method), make_parts(method)
    for number in range(2):
        take(parts, method, number)
    fresh.query.load_state_dict(copy.deepcopy(parts.query.state_dict()))
    for part, module in parts.objective.modules.items():
        fresh.objective.modules[part].load_state_dict(copy.deepcopy(module.state_dict()))
    load_optimizer_tensors(fresh.optimizer, fresh.query, optimizer_tensors(parts.optimizer, parts.query))
    for number in range(2, 4):
        ours, theirs = (take(each, method, number) for each in (parts, fresh))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(a, b) for a, b in zip(parts.query.parameters(), fresh.query.parameters(), strict=True))


def test_projections_that_collapse_show_in_the_spread():
    method = METHODS["simsiam"]
    objective = method.build(setting(make_query(method)))
    same = torch.ones(6, 8)

    class Encode:
        def with_projection(self, images):
            return same, same

    [made] = objective.passes(Encode(), (same, same), None)
    assert made.loss.item() == pytest.approx(-1)
    assert made.watched["feature_std"].item() == pytest.approx(0, abs=1e-6)
