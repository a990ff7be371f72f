"""`label-noise` as a task: wrong labels, three ways to learn from them, the last and the best epoch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast import distributed
from moco_fast.evaluation.draws import flip_labels
from moco_fast.evaluation.features import extract
from moco_fast.evaluation.heads import permuted_batches
from moco_fast.evaluation.tasks.label_noise import LabelNoise
from moco_fast.evaluation.training import Scores, Training, Trainings
from pipelines.world import World
from tests.moco_fast.trained_task import CPU, colored, run, subject_of

QUICK = LabelNoise(symmetric=(0.5,), asymmetric=(1.0,), epochs=2, batch_size=12, lr=0.02, linear_lr=(0.3,))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("colored")
    return colored(folder / "train", per_class=8, seed=0), colored(folder / "test", per_class=4, seed=1)


def test_every_way_learns_from_the_same_flipped_labels_and_is_tested_on_right_ones(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Training] = []

    def run_one(_self: Trainings, training: Training) -> Scores:
        found.append(training)
        curve = (0.25, 0.75, 0.5)
        return Scores(top1=0.5, top5=None, mean_per_class=0.5, num_tested=24, curve=curve)

    monkeypatch.setattr(Trainings, "run", run_one)
    result = run(subject_of(*sets), tmp_path, QUICK)
    assert [each.recipe.from_scratch for each in found] == [False, True, False, True]
    right = torch.arange(48) % 6
    assert torch.equal(found[0].labels, found[1].labels)
    assert torch.equal(found[0].labels, flip_labels(right, 0.5, num_classes=6, seed=0))
    assert torch.equal(found[2].labels, (right + 1) % 6)
    for each in found:
        assert each.tested_on == "test"
        assert each.every_epoch
        assert torch.equal(each.tested_labels, torch.arange(24) % 6)
    assert result.figures["scratch_sym50"].value == 0.5
    assert result.figures["scratch_sym50_best"].value == 0.75
    assert "by the test set" in result.figures["scratch_sym50_best"].title
    assert result.facts["num_wrong_asym100"] == 48
    assert result.facts["num_wrong_sym50"] == int((found[0].labels != right).sum())
    assert list(result.figures) == list(QUICK.figures())
    assert not result.curves  # of one share there is none
    result = run(subject_of(*sets), tmp_path, replace(QUICK, symmetric=(0.9, 0.5)))
    assert result.curves["scratch_symmetric"].points == ((0.5, 0.5), (0.9, 0.5))
    assert set(result.curves) == {f"{way}_symmetric" for way in QUICK.ways}


def test_linear_is_what_a_plain_loop_of_torch_trains(sets: tuple[Path, Path], tmp_path: Path) -> None:
    subject = subject_of(*sets)
    result = run(subject, tmp_path, replace(QUICK, ways=("linear",), asymmetric=()))
    features = {}
    for split, number in (("train", 48), ("test", 24)):
        with subject.loader(split, np.arange(number)) as loader:
            features[split] = extract(subject.encoder, loader, device=CPU, l2_normalize=False).values
    mean, std = features["train"].mean(dim=0), features["train"].std(dim=0, correction=0)
    train, test = ((features[split] - mean) / std for split in ("train", "test"))
    labels = flip_labels(torch.arange(48) % 6, 0.5, num_classes=6, seed=0)
    classifier = nn.Linear(12, 6)
    with torch.no_grad():
        classifier.weight.copy_(0.01 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.3, momentum=0.9)
    curve: list[float] = []
    for epoch in range(2):
        for step, rows in enumerate(permuted_batches(48, 12, seed=0, epoch=epoch)):
            optimizer.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + np.cos(np.pi * (epoch + step / 4) / 2))
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(train[rows]), labels[rows]).backward()
            optimizer.step()
        curve.append((classifier(test).argmax(dim=1) == torch.arange(24) % 6).double().mean().item())
    assert result.figures["linear_sym50"].value == curve[-1]
    assert result.figures["linear_sym50_best"].value == max(curve)


def test_wrong_labels_are_learned_from_resumably_and_hurt(sets: tuple[Path, Path], tmp_path: Path) -> None:
    task = replace(QUICK, symmetric=(0.0,), epochs=4, lr=0.2, ways=("linear", "finetune"))
    result = run(subject_of(*sets), tmp_path, task)
    assert result.figures["finetune_sym0"].value > 0.8 > 0.2 > result.figures["finetune_asym100"].value
    assert result.figures["linear_sym0"].value > 0.8 > 0.2 > result.figures["linear_asym100"].value
    assert len(list((tmp_path / "trainings").glob("*.json"))) == 2
    assert run(subject_of(*sets), tmp_path, task).figures == result.figures


def learned_on_this_rank(train: str, test: str, cache: str) -> dict[str, float]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size())
    task = replace(QUICK, asymmetric=(), epochs=1, ways=("linear", "finetune"))
    figures = run(subject_of(train, test, world=world), cache, task).figures
    return {name: figure.value for name, figure in figures.items()}


def test_two_ranks_learn_what_one_learns(run_ranks: Any, sets: tuple[Path, Path], tmp_path: Path) -> None:
    places = [str(each) for each in sets]
    [alone] = run_ranks(learned_on_this_rank, *places, str(tmp_path / "one"), world_size=1)
    first, second = run_ranks(learned_on_this_rank, *places, str(tmp_path / "two"))
    assert first == second
    # Rounding may turn a sample of 24.
    assert first == pytest.approx(alone, abs=1.5 / 24)


def test_the_linear_rate_is_chosen_without_the_test_set(
    sets: tuple[Path, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mistaken = colored(tmp_path_factory.mktemp("other") / "test", per_class=4, seed=5, shift=1)
    task = replace(QUICK, ways=("linear",), linear_lr=(1e-6, 0.3), asymmetric=())
    one = run(subject_of(*sets), tmp_path / "one", task)
    other = run(subject_of(sets[0], mistaken), tmp_path / "other", task)
    assert one.chosen == other.chosen
    assert one.chosen[0]["linear_lr_sym50"] in (1e-6, 0.3)
    assert one.figures != other.figures


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"symmetric": (1.5,)}, "--symmetric is 1.5, but must be between 0 and 1"),
        ({"ways": ()}, "--ways names nothing"),
        ({"symmetric": (), "asymmetric": ()}, "name no share"),
        ({"epochs": 0}, "--epochs is 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LabelNoise(**options).validate()


def test_unset_rates_follow_the_batch_size() -> None:
    task = LabelNoise(batch_size=256).settled(None)
    assert (task.lr, task.linear_lr) == (0.04, (0.01, 0.1, 1.0, 10.0))
    assert [noise.name for noise in task.noises] == ["sym20", "sym50", "sym80", "sym90", "sym95", "asym40"]
    assert next(iter(task.figures())) == "linear_sym20"
    assert LabelNoise(ways=("scratch",)).wants() == ()
