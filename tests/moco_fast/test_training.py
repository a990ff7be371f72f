"""Training of backbone and classifier: learning, resuming, ranks, precision."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast import distributed
from moco_fast.evaluation import training as training_module
from moco_fast.evaluation.classifier import BackboneClassifier, build_classifier
from moco_fast.evaluation.heads import LinearHeads
from moco_fast.evaluation.inputs import LiveFeatures, TaskInputs
from moco_fast.evaluation.tasks.finetune import Finetune
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.training import Trainings, score_classifier
from moco_fast.interrupt import StoppedError
from pipelines.config import ViewConfig, ViewSpec
from pipelines.loader import open_loader
from pipelines.world import World
from tests.moco_fast.trained_task import colored, run, subject_of, tiny_encoder
from tests.warm import WarmPython

QUICK = Finetune(batch_size=12, epochs=4, lr=(0.05,), head_multiplier=(10.0,))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("colored")
    return colored(folder / "train", per_class=8, seed=0), colored(folder / "test", per_class=4, seed=1)


def test_what_can_be_learned_is_learned_and_the_encoder_stays_as_it_was(
    sets: tuple[Path, Path], tmp_path: Path
) -> None:
    encoder = tiny_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    result = run(subject_of(*sets, encoder=encoder), tmp_path, QUICK)
    assert result.figures["top1"].value > 0.9
    assert result.figures["top5"].value >= result.figures["top1"].value
    assert result.facts == {"num_train": 48, "num_test": 24}
    assert result.protocol == "full"
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.training


def test_it_is_what_a_plain_loop_of_torch_trains(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(*sets)
    task = replace(QUICK, momentum=0.8, weight_decay=(0.01,), milestones=(0.5,), drop=0.5)
    taken = watched(monkeypatch)
    result = run(subject, tmp_path, task)
    encoder = tiny_encoder()
    head = nn.Linear(12, 6)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
        head.bias.zero_()
    groups = [{"params": encoder.backbone.parameters(), "lr": 0.05}, {"params": head.parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.8, weight_decay=0.01)
    view = ViewConfig(crop_scale=(0.08, 1.0), jitter_p=0, grayscale_p=0, blur_p=0)
    encoder.train()
    data = replace(subject.data, batch_size=12)
    with open_loader(data, (ViewSpec(size=16, recipe=view),), shards=subject.sets["train"]) as loader:
        for epoch in range(4):
            for group, lr in zip(optimizer.param_groups, (0.05, 0.5), strict=True):
                group["lr"] = lr * (0.5 if epoch >= 2 else 1)
            for batch in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(encoder.features(batch.views[0], "backbone")), batch.label).backward()
                optimizer.step()
    trained = taken[-1][1].state_dict()
    for name, value in [*encoder.backbone.state_dict(prefix="encoder.backbone.").items(), ("head.weight", head.weight)]:
        torch.testing.assert_close(trained[name], value.detach(), rtol=1e-4, atol=1e-5)
    encoder.eval()
    with subject.loader("test", np.arange(24)) as loader, torch.no_grad():
        [(scores, labels)] = [(head(encoder.features(each.views[0], "backbone")), each.label) for each in loader]
    assert result.figures["top1"].value == (scores.argmax(dim=1) == labels).double().mean().item()
    [written] = (tmp_path / "trainings").glob("*.json")
    assert json.loads(written.read_text())["top1"] == result.figures["top1"].value


# Resuming --------------------------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, BackboneClassifier]]:
    """Steps that are taken from now on, each with the model after it."""
    taken: list[tuple[int, BackboneClassifier]] = []
    plain = Trainings._step

    def step(self: Trainings, state: Any, *arguments: Any) -> None:
        plain(self, state, *arguments)
        taken.append((state.step, state.model))

    monkeypatch.setattr(Trainings, "_step", step)
    return taken


KILLED_AT = 9


def killed_in_training(train: str, test: str, cache: str) -> None:
    plain = Trainings._step

    def step(self: Trainings, state: Any, *arguments: Any) -> None:
        plain(self, state, *arguments)
        if state.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainings._step = step
    run(subject_of(train, test), cache, QUICK, every_steps=4)


@pytest.mark.faults
def test_after_a_kill_the_same_command_goes_on_and_ends_bit_for_bit_alike(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_python: WarmPython
) -> None:
    words = [*map(str, sets), str(tmp_path / "killed")]
    program = f"from tests.moco_fast.test_training import killed_in_training; killed_in_training(*{words!r})"
    killed = warm_python.run("-c", program)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [state] = (tmp_path / "killed" / "trainings").glob("*/step-*")
    assert state.name == "step-00000008"
    taken = watched(monkeypatch)
    resumed = run(subject_of(*sets), tmp_path / "killed", QUICK, every_steps=4)
    assert [step for step, _ in taken] == list(range(9, 17))
    of_resumed = taken[-1][1].state_dict()
    taken.clear()
    whole = run(subject_of(*sets), tmp_path / "whole", QUICK, every_steps=4)
    assert len(taken) == 16
    assert all(torch.equal(value, of_resumed[name]) for name, value in taken[-1][1].state_dict().items())
    assert resumed.figures == whole.figures
    assert not list((tmp_path / "killed" / "trainings").glob("*/step-*"))


def test_a_signal_saves_at_once(sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainings._step

    def step(self: Trainings, state: Any, *arguments: Any) -> None:
        plain(self, state, *arguments)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainings, "_step", step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGTERM: the same command continues"):
        run(subject_of(*sets), tmp_path, QUICK)
    assert signal.getsignal(signal.SIGTERM) is before
    [state] = (tmp_path / "trainings").glob("*/step-*")
    assert state.name == "step-00000005"
    monkeypatch.setattr(Trainings, "_step", plain)
    taken = watched(monkeypatch)
    run(subject_of(*sets), tmp_path, QUICK)
    assert [number for number, _ in taken] == list(range(6, 17))


def killed_in_linear(train: str, test: str, cache: str) -> None:
    plain = LinearHeads.step
    taken = 0

    def step(self: LinearHeads, *arguments: Any, **options: Any) -> None:
        nonlocal taken
        plain(self, *arguments, **options)
        taken += 1
        if taken == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    LinearHeads.step = step
    run(subject_of(train, test), cache, LINEAR)


LINEAR = Linear(protocol="v1", lr=(0.5,), batch_size=12, epochs=4)


@pytest.mark.faults
def test_augmented_linear_goes_on_after_a_kill_from_the_last_epoch(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_python: WarmPython
) -> None:
    words = [*map(str, sets), str(tmp_path / "killed")]
    program = f"from tests.moco_fast.test_training import killed_in_linear; killed_in_linear(*{words!r})"
    killed = warm_python.run("-c", program)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    heads: list[LinearHeads] = []
    plain = LinearHeads.step

    def step(self: LinearHeads, *arguments: Any, **options: Any) -> None:
        heads.append(self)
        plain(self, *arguments, **options)

    monkeypatch.setattr(LinearHeads, "step", step)
    resumed = run(subject_of(*sets), tmp_path / "killed", LINEAR)
    assert len(heads) == 8  # two of four epochs were saved
    weight = heads[-1].weight.clone()
    whole = run(subject_of(*sets), tmp_path / "whole", LINEAR)
    assert len(heads) == 8 + 16
    assert torch.equal(heads[-1].weight, weight)
    assert (resumed.figures, resumed.facts) == (whole.figures, whole.facts)
    assert not list((tmp_path / "killed" / "trainings").glob("*/step-*"))


def test_only_the_same_training_is_taken_from_the_cache(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watched(monkeypatch)
    task = replace(QUICK, epochs=1)
    first = run(subject_of(*sets), tmp_path, task)
    taken.clear()
    assert run(subject_of(*sets), tmp_path, task).figures == first.figures
    assert not taken
    changes: list[dict[str, Any]] = [{"momentum": 0.8}, {"share": 0.5}, {"from_scratch": True}]
    for change in changes:
        run(subject_of(*sets), tmp_path, replace(task, **change))
        assert taken, change
        taken.clear()
    run(subject_of(*sets, encoder=tiny_encoder(1)), tmp_path, task)
    assert taken


# Ranks -----------------------------------------------------------------------------------------------------------


def trained_on_this_rank(train: str, test: str, cache: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    models: list[BackboneClassifier] = []
    plain = training_module.build_classifier

    def build(*arguments: Any, **options: Any) -> BackboneClassifier:
        models.append(plain(*arguments, **options))
        return models[-1]

    training_module.build_classifier = build
    try:
        result = run(subject_of(train, test, world=world), cache, replace(QUICK, epochs=2))
    finally:
        training_module.build_classifier = plain
    state = {name: value.numpy() for name, value in models[-1].state_dict().items()}
    return {name: figure.value for name, figure in result.figures.items()}, state


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(
    run_ranks: Callable[..., Any], sets: tuple[Path, Path], tmp_path: Path
) -> None:
    places = list(map(str, sets))
    [(figures, alone)] = run_ranks(trained_on_this_rank, *places, str(tmp_path / "one"), world_size=1)
    (of_first, first), (of_second, second) = run_ranks(trained_on_this_rank, *places, str(tmp_path / "two"))
    assert of_first == of_second == figures
    for name, value in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


# The classifier --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_loop_and_diverged_samples_count_as_wrong(sets: tuple[Path, Path]) -> None:
    subject = subject_of(*sets)
    inputs = TaskInputs(subject=subject, source=LiveFeatures(subject=subject))
    model = build_classifier(subject.encoder, 6, seed=3).train()
    labels = torch.arange(24) % 6
    labels[3] = -1
    tested = score_classifier(model, inputs, "test", labels, num_classes=6)
    assert model.training
    with subject.loader("test", np.arange(24)) as loader, torch.no_grad():
        [scores] = [model.eval()(batch.views[0]) for batch in loader]
    keep = labels >= 0
    right = scores[keep].argmax(dim=1) == labels[keep]
    assert tested.top1 == right.double().mean().item()
    of_classes = [right[labels[keep] == label].double().mean().item() for label in range(6)]
    assert tested.mean_per_class == pytest.approx(np.mean(of_classes))
    best = scores[keep].argsort(dim=1, descending=True)[:, :5]
    assert tested.top5 == (best == labels[keep][:, None]).any(dim=1).double().mean().item()
    assert (tested.num_tested, tested.has_diverged) == (23, False)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    broken = score_classifier(model, inputs, "test", labels, num_classes=6)
    assert (broken.top1, broken.top5, broken.has_diverged) == (0, 0, True)


def test_half_precision_computes_in_it_and_keeps_weights_whole(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        dtypes.add(output.dtype)

    encoder = tiny_encoder()
    encoder.backbone[0].register_forward_hook(note)
    taken = watched(monkeypatch)
    result = run(subject_of(*sets, encoder=encoder, precision="bf16"), tmp_path, replace(QUICK, epochs=2))
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in taken[-1][1].parameters()} == {torch.float32}
    assert result.precision == "bf16"


def test_a_batch_that_cannot_be_filled_is_refused_with_what_would_work(sets: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"12 samples are learned from, .* --batch-size 12 at most"):
        run(subject_of(*sets), tmp_path, replace(QUICK, share=0.25, batch_size=16))
