"""Multi-crop: small views as queries, against a naive restatement in one process, in float64; and whole runs of it.

asym-siam: main_moco.py and moco/builder.py at 360d036 of facebookresearch/asym-siam (Wang et al. 2022): the loss of the
large query, and the mean loss of the small ones, all against the key of the large view that is not a query.
"""

import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from moco_fast import checkpoint, distributed
from moco_fast.bench.loading import resident_batch
from moco_fast.commandline import parse
from moco_fast.config import BatchNormConfig, ModelConfig, OptimConfig, validate
from moco_fast.encoders.encoder import build_encoder
from moco_fast.meaning import refuse_meaningless
from moco_fast.methods.base import Setting
from moco_fast.methods.batchnorm import use_group_statistics
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.methods.shuffle import Exchange, Together, VirtualGroups
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.presets import PRESETS
from moco_fast.training.build import build, open_run_loader
from moco_fast.training.loop import train
from moco_fast.training.runtime import start
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch
from pipelines.config import ViewsConfig
from tests.batches import random_batch

BATCH, NUM_SMALL, NUM_STEPS = 8, 3, 2
MOMENTUM, LR = 0.9, 0.02
METHODS = {
    "queue": MomentumContrast(dim=8, queue_size=37, temperature=0.5),
    "symmetric": MomentumContrast(dim=8, queue_size=37, temperature=0.5, symmetric=True),
}


def make_batch(number, rank):
    """Two views of 24 pixels and three of 16."""
    seed = 100 * (10 * number + rank)
    small = [view for part in (1, 2) for view in random_batch(seed + part, BATCH, 16).views][:NUM_SMALL]
    large = random_batch(seed, BATCH, 24)
    return replace(large, views=(*large.views, *small))


def make_query(method):
    torch.manual_seed(0)
    query = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), method)
    query.double().register_forward_pre_hook(lambda _, images: images[0].double())  # so that rounding hides no error
    return query.to(memory_format=torch.channels_last)


def make_step(method, policy, num_groups=1, accumulate=1):
    query = wrapped = make_query(method)
    if num_groups > 1:
        use_group_statistics(query, num_groups)
    setting = Setting(
        query=query, policy=policy, num_samples=99, seed=1, device=torch.device("cpu"), available_bytes=1 << 30
    )
    objective = method.build(setting)
    objective.modules["queue"].double()
    if distributed.is_distributed():
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            static = method.backward_passes * accumulate == 1  # as in a run
            wrapped = DistributedDataParallel(query, broadcast_buffers=False, static_graph=static)
    optimizer = build_optimizer(query, OptimConfig(momentum=0.0, weight_decay=0.0))
    return SimpleNamespace(
        query=query, objective=objective, step=TrainStep(query=wrapped, objective=objective, optimizer=optimizer)
    )


def result_of(parts, watched):
    return SimpleNamespace(
        query={name: value.detach().clone() for name, value in parts.query.named_parameters()},
        queue=parts.objective.modules["queue"].keys.clone(),
        losses=[each["loss"].item() for each in watched],
    )


def train_rank(name, accumulate):
    policy = Exchange(None) if distributed.is_distributed() else Together()
    parts = make_step(METHODS[name], policy, accumulate=accumulate)
    watched = []
    for step in range(NUM_STEPS):
        batches = [make_batch(accumulate * step + micro, distributed.rank()) for micro in range(accumulate)]
        watched.append(parts.step(batches, lr=LR, scheduled={"momentum": MOMENTUM}))
    return result_of(parts, watched)


def cross_entropy(queries, own, others):
    """Mean over queries of MoCo's equation 1: each key is told from others (a list of keys for each query)."""
    losses = []
    for q, k, negatives in zip(queries, own, others, strict=True):
        logits = torch.cat([(q @ k)[None], negatives @ q]) / 0.5
        losses.append(logits.logsumexp(0) - logits[0])
    return torch.stack(losses).mean()


class Simulation:
    """All ranks in turn, view by view, with the plainest code."""

    def __init__(self, name, world_size):
        self.name, self.ranks = name, range(world_size)
        parts = make_step(METHODS[name], Together())
        self.query, self.key = parts.query, parts.objective.modules["key"]
        self.queue = parts.objective.modules["queue"].keys.clone()
        self.position = 0

    def encode(self, encoder, by_rank, *, exchanged=False):
        """Unit vectors (B, D) of each rank's images; the exchange mixes the samples of ranks."""
        if not exchanged:
            return [F.normalize(encoder(images)) for images in by_rank]
        size = BATCH // len(self.ranks)
        seen = [encoder(torch.cat([by_rank[s][r * size : r * size + size] for s in self.ranks])) for r in self.ranks]
        return [F.normalize(torch.cat([seen[r][s * size : s * size + size] for r in self.ranks])) for s in self.ranks]

    def losses(self, batches):
        """The loss of each rank; the queue takes in the keys."""
        views = [[batch.views[number] for batch in batches] for number in range(2 + NUM_SMALL)]
        directions = [(0, 1)] if self.name == "queue" else [(0, 1), (1, 0)]
        # The small views pass the encoder as one batch, last, so that running statistics are the same, too.
        with torch.no_grad():
            keys = {k: self.encode(self.key, views[k], exchanged=len(self.ranks) > 1) for _, k in directions}
        large = {q: self.encode(self.query, views[q]) for q, _ in directions}
        together = [torch.cat([views[2 + n][rank] for n in range(NUM_SMALL)]) for rank in self.ranks]
        small = [rows.chunk(NUM_SMALL) for rows in self.encode(self.query, together)]
        losses = []
        for rank in self.ranks:
            terms = []
            for q, k in directions:
                terms.append(cross_entropy(large[q][rank], keys[k][rank], [self.queue] * BATCH))
                of_small = [cross_entropy(each, keys[k][rank], [self.queue] * BATCH) for each in small[rank]]
                terms.append(sum(of_small) / NUM_SMALL)
            losses.append(sum(terms))
        self.queue = self.queue.clone()
        for key in torch.cat([key for _, k in directions for key in keys[k]]):
            self.queue[self.position] = key
            self.position = (self.position + 1) % len(self.queue)
        return losses

    def step(self, step, accumulate):
        with torch.no_grad():
            for name, k in self.key.named_parameters():
                k.copy_(MOMENTUM * k + (1 - MOMENTUM) * self.query.get_parameter(name))
        self.query.zero_grad()
        found = torch.zeros(len(self.ranks), dtype=torch.float64)
        for micro in range(accumulate):
            losses = self.losses([make_batch(accumulate * step + micro, rank) for rank in self.ranks])
            (sum(losses) / len(losses) / accumulate).backward()
            found += torch.stack(losses).detach() / accumulate
        with torch.no_grad():
            for p in self.query.parameters():
                p -= LR * p.grad
        return found.tolist()


@pytest.mark.parametrize(
    ("name", "world_size", "accumulate"),
    [("queue", 1, 1), ("queue", 2, 1), ("queue", 2, 2), ("symmetric", 1, 1), ("symmetric", 2, 1)],
)
def test_small_views_are_queries_as_published(run_ranks, name, world_size, accumulate):
    if world_size == 1:
        results = [train_rank(name, accumulate)]
    else:
        results = run_ranks(train_rank, name, accumulate, world_size=world_size)
    simulation = Simulation(name, world_size)
    for number in range(NUM_STEPS):
        losses = simulation.step(number, accumulate)
        assert [result.losses[number] for result in results] == pytest.approx(losses, rel=1e-9)
    for result in results:
        for parameter, expected in simulation.query.named_parameters():
            torch.testing.assert_close(result.query[parameter], expected.detach(), rtol=1e-6, atol=1e-8, msg=parameter)
        torch.testing.assert_close(result.queue, simulation.queue, rtol=1e-6, atol=1e-8)


def test_virtual_groups_hold_the_small_views_of_their_own_samples(run_ranks):
    # One rank with two groups is two ranks, but for where the keys' groups lie: so keys are computed together here.
    halves = [make_batch(0, rank) for rank in range(2)]
    views = tuple(torch.cat(of_halves) for of_halves in zip(*(half.views for half in halves), strict=True))
    merged = Batch(views=views, index=torch.arange(16), label=torch.full((16,), -1))
    parts = make_step(METHODS["queue"], VirtualGroups(2), num_groups=2)
    loss = parts.step([merged], lr=LR, scheduled={"momentum": 1.0})["loss"].item()
    query = make_query(METHODS["queue"])
    fresh = make_step(METHODS["queue"], Together())
    queue = fresh.objective.modules["queue"].keys
    keys = torch.zeros(16, 8, dtype=torch.float64)
    dealt = torch.arange(16).view(2, 8).T.reshape(2, 8)
    with torch.no_grad():
        for group in dealt:
            keys[group] = F.normalize(query(views[1][group]))
    total = 0.0
    for group in range(2):
        own = slice(8 * group, 8 * group + 8)
        small = F.normalize(query(torch.cat([view[own] for view in views[2:]]))).chunk(NUM_SMALL)
        terms = [cross_entropy(F.normalize(query(views[0][own])), keys[own], [queue] * 8)]
        terms += [cross_entropy(each, keys[own], [queue] * 8) / NUM_SMALL for each in small]
        total += sum(terms).item() / 2
    assert loss == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_guessing_is_the_loss_of_an_encoder_that_cannot_tell(name):
    method = METHODS[name]
    objective = make_step(method, Together()).objective
    same = torch.ones(BATCH, 8, dtype=torch.float64)
    object.__setattr__(objective, "keys", lambda *_: F.normalize(same))
    objective.modules["queue"].keys.copy_(F.normalize(torch.ones(37, 8)))
    batch = make_batch(0, 0)

    def encode(images):
        return torch.ones(len(images), 8, dtype=torch.float64)

    loss = sum(made.loss for made in objective.passes(encode, batch.views, batch.index)).item()
    chart = method.charts(BATCH, NUM_SMALL)[0]
    assert loss == pytest.approx(chart.level.value)
    assert "small views" in chart.caption
    assert loss == pytest.approx(2 * method.charts(BATCH)[0].level.value)


def test_the_small_views_pass_the_encoder_together():
    parts = make_step(METHODS["symmetric"], Together())
    shapes = []
    parts.query.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    parts.step([make_batch(0, 0)], lr=LR, scheduled={"momentum": MOMENTUM})
    large, small = (BATCH, 3, 24, 24), (NUM_SMALL * BATCH, 3, 16, 16)
    assert shapes == [large, large, small]


def small_run(packed_demo, out, **sections):
    base = PRESETS["moco-v2-multicrop"][1]
    config = replace(
        base,
        data=replace(base.data, shards=str(packed_demo.train), batch_size=16, lanes=8, num_threads=1, backend="dali"),
        views=replace(base.views, size=64, small_size=32, num_small=2),
        model=ModelConfig(encoder="resnet18_quarter"),
        method=replace(base.method, dim=8, queue_size=100),
        bn=BatchNormConfig(num_groups=2),
        run=replace(base.run, device="cpu", precision="fp32", steps=4, out=str(out)),
        checkpoint=replace(base.checkpoint, every_steps=2, keep=2),
        log=replace(base.log, every_steps=1, trackers=()),
    )
    return replace(config, **sections)


def tensors_of(out):
    saved = checkpoint.load(checkpoint.find_newest(out / "checkpoints"))
    assert saved.step == 4
    return {**saved.model, **saved.optimizer}


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_the_preset_trains_and_continues_bit_for_bit(packed_demo, tmp_path, fresh_accelerator, backend):
    out = tmp_path / "run"
    config = small_run(packed_demo, out)
    config = replace(config, data=replace(config.data, backend=backend))
    validate(config)
    assert train(config) == 0
    whole = tensors_of(out)
    assert all(value.isfinite().all() for value in whole.values())
    shutil.rmtree(checkpoint.find_newest(out / "checkpoints"))
    metrics = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text(
        "".join(line for line in metrics if '"step": 2,' in line or '"step": 1,' in line)
    )
    assert train(config) == 0
    again = tensors_of(out)
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_loader_makes_the_views_that_the_method_looks_at(packed_demo, tmp_path, name):
    preset = PRESETS[name][1]
    config = small_run(packed_demo, tmp_path, method=preset.method)
    if not preset.views.num_small:
        config = replace(config, views=ViewsConfig(size=64, query=config.views.query, key=config.views.key))
    num_views = {"memory-bank": 1, "moco-v2-multicrop": 4}.get(name, 2)
    runtime = start(config.run, env={})
    loader = open_run_loader(config, runtime)
    two = open_run_loader(small_run(packed_demo, tmp_path), runtime)
    try:
        batch, other = next(iter(loader)), next(iter(two))
        # What is not looked at has no part in what is.
        assert len(batch.views) == num_views
        assert all(torch.equal(*pair) for pair in zip(batch.views, other.views, strict=False))
        assert torch.equal(batch.index, other.index)
        resident = resident_batch(config, runtime, 3, torch.device("cpu"))
        assert [view.shape[2:] for view in resident.views] == [view.shape[2:] for view in batch.views]
    finally:
        loader.close()
        two.close()
        runtime.close()


@pytest.mark.parametrize("name", PRESETS)
def test_small_views_are_refused_by_methods_that_do_not_train_on_them(name):
    config = replace(PRESETS[name][1], views=ViewsConfig(num_small=2))
    if config.method.takes_small_views:
        validate(config)
        return
    with pytest.raises(ValueError, match="num-small 2") as refused:
        validate(config)
    assert config.method.name in str(refused.value)
    assert "moco-v2-multicrop" in str(refused.value)


def test_a_transformer_without_positions_for_small_views_refuses_them(packed_demo, tmp_path, fresh_accelerator):
    config = small_run(packed_demo, tmp_path, model=ModelConfig(encoder="vit_tiny_patch16_224"))
    runtime = start(config.run, env={})
    try:
        with pytest.raises(
            ValueError, match=r"positions for images of 224 pixels alone, but --views\.small-size is 32"
        ):
            build(replace(config, views=replace(config.views, size=224)), runtime)
        # timm builds this one so that it interpolates them.
        parts = build(replace(config, model=ModelConfig(encoder="test_vit")), runtime)
        batch = next(iter(parts.loader))
        watched = parts.train_step([batch], lr=LR, scheduled={"momentum": MOMENTUM})
        assert watched["loss"].isfinite()
        parts.loader.close()
    finally:
        runtime.close()


def test_the_documented_command_trains_on_the_small_views_that_it_names(packed_demo):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    words = text.split("-m moco_fast.train moco-v2-multicrop ")[1].split("\n\n")[0].replace("\\\n", "").split()
    config = parse(
        ["moco-v2-multicrop", *(str(packed_demo.train) if word == "shards/train" else word for word in words)]
    )
    specs = config.method.views_of(config.views)
    assert [spec.size for spec in specs] == [224, 224, 112, 112, 112, 112]
    assert specs[2].recipe == replace(config.views.query, crop_scale=(0.05, 0.25))


def test_colors_of_small_views_that_mean_nothing_are_refused():
    preset = PRESETS["moco-v2-multicrop"][1]
    small = replace(preset.views.small, jitter_p=0.0, hue=0.4)
    with pytest.raises(ValueError, match=r"--views\.small\.hue 0\.4 means nothing beside --views\.small\.jitter-p 0"):
        refuse_meaningless(replace(preset, views=replace(preset.views, small=small)), preset)


def test_the_preset_holds_the_published_numbers():
    preset = PRESETS["moco-v2-multicrop"][1]
    views, v2 = preset.views, PRESETS["moco-v2"][1]
    assert (views.size, views.num_small, views.small_size) == (224, 6, 96)
    assert (views.query.crop_scale, views.key.crop_scale, views.small.crop_scale) == (
        (0.14, 1),
        (0.14, 1),
        (0.05, 0.14),
    )
    for view in (views.query, views.key, views.small):
        assert replace(view, crop_scale=(0.2, 1)) == v2.views.query
    assert (preset.run.epochs, preset.data.batch_size, preset.optim.lr) == (100, 256, 0.03)
    assert (preset.method, preset.optim, preset.bn) == (v2.method, v2.optim, v2.bn)
    assert preset.method.charts(256, 6)[0].level.value == pytest.approx(2 * math.log(65537))
