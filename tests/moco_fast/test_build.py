"""Every mechanism as a configuration names it: built, stepped on real batches, saved and loaded as tensors."""

import os
from dataclasses import replace

import pytest
import torch

from moco_fast.config import BatchNormConfig, Config, MocoConfig, ModelConfig, OptimConfig, RunConfig, validate
from moco_fast.methods.batchnorm import average_batch_statistics
from moco_fast.training.build import build
from moco_fast.training.optim import load_optimizer_tensors, optimizer_tensors
from moco_fast.training.runtime import start
from pipelines.config import VIEWS, DataConfig

MECHANISMS = {
    "queue": MocoConfig(queue_size=100),
    "symmetric": MocoConfig(queue_size=100, loss="symmetric"),
    "v3": MocoConfig(dictionary="batch", loss="v3", momentum_schedule="cosine"),
    "end-to-end": MocoConfig(dictionary="batch", key_encoder="query"),
    "bank": MocoConfig(dictionary="bank", queue_size=50),
}
OPTIMIZERS = {"queue": "sgd", "symmetric": "lamb", "v3": "lars", "end-to-end": "adamw", "bank": "sgd"}


def configuration(packed_demo, mechanism) -> Config:
    head = "v3" if mechanism == "v3" else "mlp"
    return Config(
        data=DataConfig(shards=str(packed_demo.train), batch_size=16, lanes=8, num_threads=1),
        views=VIEWS["cifar10"],
        model=ModelConfig(encoder="resnet18_quarter", stem="cifar", head=head, dim=8, mlp_dim=16),
        moco=MECHANISMS[mechanism],
        bn=BatchNormConfig(policy="sync") if mechanism == "v3" else BatchNormConfig(num_groups=2),
        optim=OptimConfig(name=OPTIMIZERS[mechanism], lr=0.01, clip_norm=1.0),
        run=RunConfig(device="cpu", precision="fp32", steps=4),
    )


def tensors_of(parts):
    modules = {"query": parts.query, "key": parts.key, "queue": parts.queue}
    model = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    return {name: value.clone() for name, value in (model | optimizer_tensors(parts.optimizer, parts.query)).items()}


def load(parts, tensors):
    for name in ("query", "key", "queue"):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        getattr(parts, name).load_state_dict(own)
    optimizer = {key: value for key, value in tensors.items() if "/" in key}
    load_optimizer_tensors(parts.optimizer, parts.query, optimizer)


def step(parts, batch):
    return {name: value.item() for name, value in parts.train_step([batch], lr=0.01, momentum=0.9).items()}


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_mechanism_trains_and_continues_bit_for_bit(packed_demo, mechanism, monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    config = configuration(packed_demo, mechanism)
    validate(config)
    runtime = start(config.run)
    parts, other = build(config, runtime), build(replace(config, run=replace(config.run, seed=5)), runtime)
    try:
        batches = [batch for batch, _ in zip(parts.loader, range(4), strict=False)]
        before = tensors_of(parts)
        watched = [step(parts, batch) for batch in batches[:2]]
        assert all(torch.tensor(list(each.values())).isfinite().all() for each in watched)
        saved = tensors_of(parts)
        changed = {name for name in before if not torch.equal(before[name], saved[name])}
        assert "query.backbone.conv1.weight" in changed
        assert ("key.backbone.conv1.weight" in changed) == (mechanism in ("queue", "symmetric", "v3"))
        assert ("queue.keys" in changed) == (mechanism in ("queue", "symmetric", "bank"))
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
        ({"moco": MocoConfig(key_encoder="query")}, "use --moco.dictionary batch"),
        (
            {"moco": MocoConfig(key_encoder="query", dictionary="batch"), "model": ModelConfig(head="v3")},
            "use --model.head mlp",
        ),
        (
            {"moco": MocoConfig(key_encoder="query", dictionary="batch"), "bn": BatchNormConfig(policy="gather")},
            "use exchange",
        ),
        ({"moco": MocoConfig(dictionary="bank", loss="symmetric")}, "use --moco.loss one-sided"),
        ({"moco": MocoConfig(bank_momentum=1.5)}, "--moco.bank-momentum is 1.5"),
        ({"optim": OptimConfig(clip_norm=0.0)}, "--optim.clip-norm is 0.0"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(packed_demo, sections, message):
    with pytest.raises(ValueError, match=message):
        validate(replace(configuration(packed_demo, "queue"), **sections))
