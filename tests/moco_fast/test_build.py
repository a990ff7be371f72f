"""Every mechanism as a configuration names it: built, stepped on real batches, saved and loaded as tensors."""

import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from moco_fast.config import BatchNormConfig, Config, EvalConfig, ModelConfig, OptimConfig, RunConfig, validate
from moco_fast.methods.batchnorm import average_batch_statistics
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.prediction import Byol, SimSiam
from moco_fast.optimizers.optim import load_optimizer_tensors, optimizer_tensors
from moco_fast.training.build import build, open_sets
from moco_fast.training.runtime import start
from pipelines.config import VIEWS, DataConfig
from shards.sets.manifest import Manifest

METHODS = {
    "queue": MomentumContrast(dim=8, queue_size=100),
    "symmetric": MomentumContrast(dim=8, queue_size=100, symmetric=True),
    "v3": MomentumContrastV3(dim=8, mlp_dim=16),
    "end-to-end": EndToEnd(dim=8),
    "bank": MemoryBank(dim=8, num_negatives=50),
    "byol": Byol(dim=8, mlp_dim=16),
    "simsiam": SimSiam(dim=8, predictor_dim=4),
}
OPTIMIZERS = {"symmetric": "lamb", "v3": "lars", "end-to-end": "adamw", "byol": "lars"}


def configuration(packed_demo, name) -> Config:
    synchronized = name in ("v3", "byol", "simsiam")
    return Config(
        data=DataConfig(shards=str(packed_demo.train), batch_size=16, lanes=8, num_threads=1),
        views=VIEWS["cifar10"],
        model=ModelConfig(encoder="resnet18_quarter", stem="cifar"),
        method=METHODS[name],
        bn=BatchNormConfig(policy="sync") if synchronized else BatchNormConfig(num_groups=2),
        optim=OptimConfig(name=OPTIMIZERS.get(name, "sgd"), lr=0.01, clip_norm=1.0),
        run=RunConfig(device="cpu", precision="fp32", steps=4),
    )


def tensors_of(parts):
    model = {f"{name}.{key}": value for name, part in parts.modules.items() for key, value in part.state_dict().items()}
    return {name: value.clone() for name, value in (model | optimizer_tensors(parts.optimizer, parts.query)).items()}


def load(parts, tensors):
    for name, part in parts.modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        part.load_state_dict(own)
    optimizer = {key: value for key, value in tensors.items() if "/" in key}
    load_optimizer_tensors(parts.optimizer, parts.query, optimizer)


def step(parts, batch):
    return {
        name: value.item() for name, value in parts.train_step([batch], lr=0.01, scheduled={"momentum": 0.9}).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_continues_bit_for_bit(packed_demo, name, monkeypatch):
    for variable in [variable for variable in os.environ if variable.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)
    config = configuration(packed_demo, name)
    validate(config)
    runtime = start(config.run)
    parts, other = build(config, runtime), build(replace(config, run=replace(config.run, seed=5)), runtime)
    try:
        batches = [batch for batch, _ in zip(parts.loader, range(4), strict=False)]
        before = tensors_of(parts)
        watched = [step(parts, batch) for batch in batches[:2]]
        assert all(torch.tensor(list(each.values())).isfinite().all() for each in watched)
        saved = tensors_of(parts)
        changed = {key for key in before if not torch.equal(before[key], saved[key])}
        assert "query.backbone.conv1.weight" in changed
        assert ("key.backbone.conv1.weight" in changed) == (name in ("queue", "symmetric", "v3", "byol"))
        assert ("queue.keys" in changed) == (name in ("queue", "symmetric", "bank"))
        load(other, saved)
        random = torch.get_rng_state()
        ours = [step(parts, batch) for batch in batches[2:]]
        torch.set_rng_state(random)
        assert [step(other, batch) for batch in batches[2:]] == ours
        average_batch_statistics(parts.query)
    finally:
        parts.loader.close()
        other.loader.close()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"method": EndToEnd(), "bn": BatchNormConfig(policy="gather")},
            "--bn.policy gather cannot be used by end-to-",
        ),
        ({"method": MemoryBank(), "bn": BatchNormConfig(policy="exchange")}, "use auto or virtual or sync or none"),
        ({"method": Byol()}, "--bn.policy auto cannot be used by byol: use sync or none"),
        ({"method": MemoryBank(momentum=1.5)}, "--method.momentum is 1.5"),
        ({"method": MemoryBank(num_negatives=0)}, "--method.num-negatives is 0"),
        ({"method": MomentumContrast(queue_size=0)}, "--method.queue-size is 0"),
        ({"method": MomentumContrast(temperature=0.0)}, "--method.temperature is 0.0"),
        ({"method": MomentumContrastV3(mlp_dim=0)}, "--method.mlp-dim is 0"),
        ({"method": SimSiam(predictor_dim=0)}, "--method.predictor-dim is 0"),
        ({"method": EndToEnd(dim=0)}, "--method.dim is 0"),
        ({"optim": OptimConfig(clip_norm=0.0)}, "--optim.clip-norm is 0.0"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(packed_demo, sections, message):
    with pytest.raises(ValueError, match=message):
        validate(replace(configuration(packed_demo, "queue"), **sections))


def opened_sets(config):
    read = []

    def noting(folder, read_manifest=Manifest.read):
        read.append(str(folder))
        return read_manifest(folder)

    with patch.object(Manifest, "read", noting):
        sets = open_sets(config)
    return read, *(vars(shards.manifest)["identity"] for shards in (sets.training, sets.held_out))


def test_the_ranks_of_a_machine_read_each_manifest_once(run_ranks, packed_demo):
    config = replace(configuration(packed_demo, "queue"), eval=EvalConfig(shards=str(packed_demo.val)))
    expected = [Manifest.read(folder).identity for folder in (packed_demo.train, packed_demo.val)]
    first, second = run_ranks(opened_sets, config)
    # Nor does the second compute what tells one set from another.
    assert first == ([str(packed_demo.train), str(packed_demo.val)], *expected)
    assert second == ([], *expected)
