"""No option that is accepted does nothing: what is refused changes no number of a training, and what is not, does."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from moco_fast.commandline import main, parse
from moco_fast.config import BatchNormConfig, Config, ModelConfig, OptimConfig, RunConfig, validate
from moco_fast.encoders.encoder import ENCODERS
from moco_fast.meaning import refuse_meaningless
from moco_fast.methods.base import Method
from moco_fast.methods.registry import METHODS, method_class
from moco_fast.presets import PRESETS
from moco_fast.training import build as build_module
from moco_fast.training.build import build
from moco_fast.training.runtime import Runtime, start
from moco_fast.training.schedule import lr_at
from pipelines.batch import Batch
from pipelines.config import DataConfig
from tests.batches import random_batch

BATCH, NUM_STEPS = 8, 10


class Tiny(nn.Sequential):
    num_features = 4

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class NoLoader:
    num_samples = NUM_STEPS * BATCH

    def __len__(self) -> int:
        return NUM_STEPS


@pytest.fixture(scope="module")
def runtime() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield start(RunConfig(device="cpu", precision="fp32"), env={})
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", Tiny)
    monkeypatch.setattr(build_module, "open_run_loader", lambda *_: NoLoader())


def configuration(shards: str, **sections: Any) -> Config:
    return Config(
        data=DataConfig(shards=shards, batch_size=BATCH),
        run=RunConfig(device="cpu", precision="fp32"),
        model=ModelConfig(encoder="tiny"),
        bn=sections.pop("bn", BatchNormConfig(num_groups=2)),
        **sections,
    )


def make_batch(number: int) -> Batch:
    return random_batch(number, BATCH, 6)


def outcome(config: Config, runtime: Runtime) -> list[torch.Tensor]:
    """All that a training gives: its losses, and the encoder after steps at the start, middle and end of a run."""
    parts = build(config, runtime)
    torch.manual_seed(1)
    losses = []
    for step in (0, 4, 9):
        lr, scheduled = lr_at(step, NUM_STEPS, config.optim), config.method.scheduled(step, NUM_STEPS)
        losses.append(parts.train_step([make_batch(step)], lr=lr, scheduled=scheduled)["loss"])
    return [torch.stack(losses), *(parameter.detach() for parameter in parts.query.parameters())]


def is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def with_option(config: Config, option: str, value: Any) -> Config:
    section, _, name = option.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


METHOD_OPTIONS: dict[str, Any] = {
    "dim": 5,
    "head": "linear",
    "mlp_dim": 7,
    "predictor_dim": 5,
    "queue_size": 13,
    "num_negatives": 13,
    "momentum": 0.3,
    "momentum_schedule": "constant",
    "temperature": 0.5,
    "symmetric": True,
}
"""Another value for every option of every method."""
OTHER_OPTIONS = {
    "model.mean": (0.1, 0.2, 0.3),
    "model.std": (0.1, 0.2, 0.3),
    "bn.num_groups": 4,
    "bn.policy": "none",
}
OPTIM_OPTIONS = {
    "optim.lr": 0.07,
    "optim.momentum": 0.5,
    "optim.betas": (0.5, 0.9),
    "optim.trust": 0.5,
    "optim.weight_decay": 0.3,
    "optim.clip_norm": 1e-3,
    "optim.milestones": (0.3, 0.5),
    "optim.decay": 0.2,
    "optim.decay_every": 0.4,
    "optim.warmup": 0.5,
}


def is_refused(config: Config, recipe: Config) -> bool:
    try:
        refuse_meaningless(config, recipe)
    except ValueError as error:
        return "means nothing beside" in str(error)
    return False


def check_options(base: Config, options: dict[str, Any], runtime: Runtime) -> set[str]:
    """Hold the promise for each option; return those that were refused."""
    refused = set()
    expected = outcome(base, runtime)
    assert is_same(outcome(base, runtime), expected), "the test would see differences that are none"
    for option, value in options.items():
        changed = with_option(base, option, value)
        validate(changed)
        if is_refused(changed, base):
            refused.add(option)
        assert is_same(outcome(changed, runtime), expected) == (option in refused), (base.method, base.optim, option)
    return refused


SMALL = {"dim": 4, "mlp_dim": 6, "predictor_dim": 3, "queue_size": 12, "num_negatives": 12}


def small(name: str) -> Method:
    """A method with few numbers, a momentum that shows, and a schedule that is not the one in METHOD_OPTIONS."""
    cls = method_class(name)
    names = {field.name for field in dataclasses.fields(cls)}
    chosen = {"momentum": 0.9, "momentum_schedule": "cosine"} | SMALL
    return cls(**{name: value for name, value in chosen.items() if name in names})


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_does_something(packed_demo: Any, runtime: Runtime, name: str) -> None:
    method = small(name)
    options = {f"method.{field.name}": METHOD_OPTIONS[field.name] for field in dataclasses.fields(method)}
    synchronized = "auto" not in method.bn_policies
    bn = BatchNormConfig(policy="sync") if synchronized else BatchNormConfig(num_groups=2)
    base = configuration(str(packed_demo.train), method=method, bn=bn, optim=OptimConfig(lr=0.1, momentum=0.5))
    # On one rank, `none` is the same as `sync`.
    others = {name: value for name, value in OTHER_OPTIONS.items() if not (synchronized and name.startswith("bn."))}
    assert not check_options(base, options | others, runtime)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "exponential", "constant"])
def test_every_option_of_every_optimizer_does_something_or_is_refused(
    packed_demo: Any, runtime: Runtime, name: Any, schedule: Any
) -> None:
    optim = OptimConfig(name=name, schedule=schedule, lr=0.1, weight_decay=0.1)
    base = configuration(str(packed_demo.train), optim=optim, method=small("momentum-contrast"))
    refused = check_options(base, OPTIM_OPTIONS, runtime)
    expected = {"optim.betas"} if name in ("sgd", "lars") else {"optim.momentum"}
    expected |= {"optim.trust"} - ({"optim.trust"} if name == "lars" else set())
    expected |= {"optim.milestones"} if schedule != "step" else set()
    expected |= {"optim.decay", "optim.decay_every"} if schedule != "exponential" else set()
    assert refused == expected


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_sets_what_means_nothing_in_it(name: str) -> None:
    preset = PRESETS[name][1]
    validate(preset)
    # Held-out shards are the user's to name, and views without blur keep its default.
    refuse_meaningless(preset, Config(data=preset.data, views=preset.views, method=preset.method, eval=preset.eval))


@pytest.fixture
def shards(tmp_path: Any) -> str:
    (tmp_path / "manifest.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("memory-bank --bn.policy exchange", "--bn.policy exchange cannot be used by memory-bank: use auto or virtual"),
        ("memory-bank --views.key.blur-p 0.5", "--views.key.blur-p 0.5 means nothing beside memory-bank, which looks"),
        ("moco-v3-resnet50 --bn.num-groups 4", "beside --bn.policy sync"),
        ("moco-v3-vit-small --optim.trust 0.1", "beside --optim.name adamw"),
        ("moco-v2 --optim.milestones 0.5", "beside --optim.schedule cosine"),
        ("demo --run.epochs 5", "--run.epochs 5.0 means nothing beside --run.steps 200"),
        ("moco-v2 --eval.every-steps 5", "beside no --eval.shards"),
        ("moco-v2 --data.cache /tmp", "which is on this machine"),
        ("demo --data.backend torch --data.hw-decoder-load 0.5", "beside --data.backend torch"),
        ("moco-v2 --run.device cpu --data.hw-decoder-load 0.5", "means nothing beside a CPU"),
        (
            "moco-v2 --data.backend dali --data.cache-decoded 8",
            "--data.cache-decoded 8.0 means nothing beside --data.b",
        ),
        ("moco-v2 --data.backend torch --data.read-threads 8", "--data.read-threads 8 means nothing beside"),
        ("moco-v1 --views.query.blur-sigma 0.1 1", "beside --views.query.blur-p 0"),
        ("moco-v2 --views.query.jitter-p 0 --views.query.hue 0.2", "beside --views.query.jitter-p 0"),
        ("moco-v2 --views.key.grayscale-p 0 --views.key.grayscale-first", "beside --views.key.grayscale-p 0"),
        ("moco-v2 --data.stream-samples 500", "is for tars without an index"),
    ],
)
def test_what_means_nothing_is_refused_where_it_is_given(
    shards: str, words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--data.shards", shards]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "beside"),
    [
        ("lanes", "stream-samples 500"),
        ("window-shards", "stream-samples 500"),
        ("cache-decoded", "stream-samples 500"),
        ("read-threads", "backend torch"),
    ],
)
def test_streamed_tars_have_neither_lanes_nor_readers(tmp_path: Any, option: str, beside: str) -> None:
    words = ["moco-v2", "--data.shards", str(tmp_path), "--data.stream-samples", "500"]
    with pytest.raises(ValueError, match=rf"--data\.{option} 8(\.0)? means nothing beside --data\.{beside}"):
        parse([*words, f"--data.{option}", "8"])


@pytest.mark.parametrize("words", ["moco-v3-resnet50 --optim.name sgd", "demo --run.steps 20"])
def test_what_the_preset_says_of_an_option_is_not_the_users_to_leave_out(shards: str, words: str) -> None:
    config = parse([*words.split(), "--data.shards", shards])
    assert dataclasses.is_dataclass(config)
