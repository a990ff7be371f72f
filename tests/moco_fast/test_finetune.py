"""`finetune` as a task: protocols, choices, shares of labels."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.cli import main
from moco_fast.evaluation.draws import asymmetric_targets, draw_share, flip_labels, listed_labels
from moco_fast.evaluation.result import read_results
from moco_fast.evaluation.tasks.finetune import Finetune
from moco_fast.evaluation.training import Training, Trainings
from shards.sets import open_set
from tests.moco_fast.trained_task import colored, run, subject_of, tiny_encoder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("colored")
    return colored(folder / "train", per_class=8, seed=0), colored(folder / "test", per_class=4, seed=1)


# Protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "share", "decay"), [("semi-1", 0.01, 5e-4), ("semi-10", 0.1, 1e-4)])
def test_semi_supervised_protocols_are_mmselfsup_s(protocol: Any, share: float, decay: float) -> None:
    # configs/benchmarks/classification/imagenet/imagenet_{1,10}percent/resnet50_head*_4xb64-steplr*-20e of
    # open-mmlab/mmselfsup: 20 epochs, 4 x 64, SGD, x0.2 at 12 and 16.
    task = Finetune(protocol=protocol).settled(None)
    assert (task.share, task.epochs, task.batch_size, task.momentum) == (share, 20, 256, 0.9)
    recipes = task.recipes()
    assert {(each.lr, each.head_multiplier) for each in recipes} == {
        (lr, multiplier) for lr in (0.1, 0.01, 0.001) for multiplier in (1, 10, 100)
    }
    assert {(each.weight_decay, each.nesterov, each.optimizer) for each in recipes} == {(decay, False, "sgd")}
    by_epoch = [recipes[0].lr_at(epoch * 50, 20 * 50) for epoch in range(20)]
    assert by_epoch == pytest.approx([0.1] * 12 + [0.02] * 4 + [0.004] * 4)
    assert recipes[0].lr_at(12 * 50 - 1, 1000) == 0.1


def test_transfer_is_ssl_transfer_s() -> None:
    # finetune.py of linusericsson/ssl-transfer: 5,000 steps of 64, SGD with Nesterov's momentum, cosine, a grid of four
    # rates and five decays, each divided by the rate.
    task = Finetune(protocol="transfer").settled(None)
    recipes = task.recipes()
    assert (task.share, task.steps, task.epochs, task.batch_size, task.choice_share) == (1, 5000, None, 64, 0.2)
    assert {each.nesterov for each in recipes} == {True}
    expected = [(lr, decay / lr) for lr in (0.1, 0.01, 0.001, 0.0001) for decay in (0, 1e-6, 1e-5, 1e-4, 1e-3)]
    assert [each.lr for each in recipes] == [lr for lr, _ in expected]
    assert [each.weight_decay for each in recipes] == pytest.approx([decay for _, decay in expected])
    assert recipes[0].lr_at(2500, 5000) == pytest.approx(0.05)
    assert recipes[0].num_steps(123) == 5000


def test_transformers_are_fine_tuned_as_moco_v3_s() -> None:
    # main.py of facebookresearch/deit with its defaults, 150 epochs (README of facebookresearch/moco-v3), batch 1,024;
    # transfer/README.md of moco-v3: 8 x 128, 100 epochs, lr 3e-4 for 512 samples, decay 0.1, 3 epochs of warm-up.
    [full] = Finetune().settled(None, is_transformer=True).recipes()
    [transfer] = Finetune(protocol="transfer").settled(None, is_transformer=True).recipes()
    assert (full.lr, full.weight_decay, full.epochs, full.batch_size) == (1e-3, 0.05, 150, 1024)
    assert (transfer.lr, transfer.weight_decay, transfer.epochs, transfer.batch_size) == (6e-4, 0.1, 100, 1024)
    for recipe in (full, transfer):
        assert (recipe.optimizer, recipe.schedule, recipe.min_lr) == ("adamw", "cosine", 1e-5)
        assert (recipe.label_smoothing, recipe.mixup, recipe.cutmix, recipe.drop_path) == (0.1, 0.8, 1, 0.1)
        assert recipe.layer_decay == 1
    assert full.lr_at(5 * 10, 150 * 10) == 1e-3
    assert full.lr_at(0, 1500) == 0
    assert full.lr_at(1500, 1500) == pytest.approx(1e-5)
    assert transfer.warmup * 100 == 3
    semi = Finetune(protocol="semi-1").settled(None, is_transformer=True)
    assert semi == Finetune(protocol="semi-1").settled(None)


def test_what_is_given_is_not_the_protocol_s() -> None:
    task = Finetune(protocol="semi-1", batch_size=64, steps=30, weight_decay=(0.0, 0.1), mixup=0.3, drop=0.5).settled(
        None
    )
    assert (task.steps, task.epochs) == (30, None)
    assert task.lr == (0.025, 0.0025, 0.00025)
    assert len(task.recipes()) == 18
    assert (task.recipes()[0].mixup, task.recipes()[0].drop) == (0.3, 0.5)
    assert Finetune(protocol="transfer", epochs=3).settled(None).steps is None
    listed = Finetune(protocol="semi-1", labels_file="list.txt").settled(None)
    listed.validate()
    assert listed.share is None


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (Finetune(share=0.0), "--share is 0"),
        (Finetune(share=1.5), "--share is 1.5, but must be between 0 and 1"),
        (Finetune(lr=()), "--lr names nothing"),
        (Finetune(weight_decay=(-0.1,)), "--weight-decay is -0.1"),
        (Finetune(epochs=3, steps=4), "both say how long to train"),
        (Finetune(share=0.5, labels_file="list.txt"), "means nothing beside --labels-file"),
    ],
)
def test_options_that_cannot_work_are_refused(task: Finetune, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task.validate()


# The command -----------------------------------------------------------------------------------------------------


def test_a_command_that_a_signal_stopped_says_so_and_continues(
    finished_run: Path, packed_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["eval", "finetune", "--encoder", str(finished_run), "--device", "cpu", "--cache", str(tmp_path)]
    words += ["--share", "0.25", "--batch-size", "36", "--epochs", "2", "--out", str(tmp_path / "out.json")]
    plain = Trainings._step

    def step(self: Trainings, state: Any, *arguments: Any) -> None:
        plain(self, state, *arguments)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainings, "_step", step)
    assert main(words) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: the same command continues from here" in capsys.readouterr().err
    monkeypatch.setattr(Trainings, "_step", plain)
    assert main(words) == 0
    [result] = read_results(tmp_path / "out.json")
    assert (result.task, result.protocol, result.facts["num_train"]) == ("finetune", "full", 72)
    assert set(result.figures) == {"top1", "top5", "mean_per_class"}


# Choices ---------------------------------------------------------------------------------------------------------

GRID = Finetune(batch_size=12, epochs=2, lr=(1e-6, 0.05), head_multiplier=(10.0,), choice_share=0.25)


def trained(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    found: list[Training] = []
    plain = Trainings.run

    def run_one(self: Trainings, training: Training) -> Any:
        found.append(training)
        return plain(self, training)

    monkeypatch.setattr(Trainings, "run", run_one)
    return found


def test_the_best_of_several_is_chosen_on_a_part_of_the_training_set_and_trained_on_all(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(monkeypatch)
    result = run(subject_of(*sets), tmp_path, GRID)
    first, second, final = found
    assert result.chosen == ({"lr": 0.05, "head_multiplier": 10.0, "weight_decay": 1e-4},)
    assert final.recipe == second.recipe
    assert [each.tested_on for each in found] == ["train", "train", "test"]
    for each in (first, second):
        assert not set(each.samples) & set(np.flatnonzero(each.tested_labels.numpy() >= 0))
        assert len(each.samples) == 36
    assert final.samples.tolist() == list(range(48))
    assert "chosen: lr 0.05, classifier x10, decay 0.0001" in capsys.readouterr().err


def test_the_test_set_has_no_part_in_a_choice(
    sets: tuple[Path, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mistaken = colored(tmp_path_factory.mktemp("other") / "test", per_class=4, seed=5, shift=1)
    as_it_is, other = (
        run(subject_of(sets[0], test), tmp_path / test.parent.name, GRID) for test in (sets[1], mistaken)
    )
    assert as_it_is.chosen == other.chosen
    assert as_it_is.figures != other.figures
    assert run(subject_of(*sets), tmp_path / "again", GRID).figures == as_it_is.figures


def test_training_from_scratch_does_not_know_the_encoder(sets: tuple[Path, Path], tmp_path: Path) -> None:
    task = Finetune(batch_size=12, epochs=1, lr=(0.05,), from_scratch=True)
    one, other = (run(subject_of(*sets, encoder=tiny_encoder(seed)), tmp_path, task) for seed in (0, 1))
    assert one.figures == other.figures
    assert one.headline.title == "trained from scratch, top-1"


# Draws -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=200), st.floats(0.01, 1), st.integers(0, 2**31), st.integers(0, 9)
)
def test_a_draw_has_the_same_share_of_every_class(labels: list[int], share: float, seed: int, other: int) -> None:
    given_labels = torch.tensor(labels)
    drawn = draw_share(given_labels, share, seed=seed)
    kept = drawn >= 0
    assert torch.equal(drawn[kept], given_labels[kept])
    for label in set(labels) - {-1}:
        assert int((drawn == label).sum()) == max(1, round(share * labels.count(label)))
    assert torch.equal(drawn, draw_share(given_labels, share, seed=seed))


def test_draws_differ_by_seed() -> None:
    labels = torch.arange(300) % 3
    assert not torch.equal(draw_share(labels, 0.1, seed=0), draw_share(labels, 0.1, seed=1))


def test_a_list_names_samples_by_key_or_file(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "train"
    colored(folder, per_class=8, seed=0)
    for number, size in enumerate((20, 20, 8)):
        names = [f"class-{i % 2}/image-{number}-{i // 2}.jpg" for i in range(size)]
        (folder / f"shard-{number:06d}.sources.txt").write_text("".join(f"/data/{name}\n" for name in names))
    shards = open_set(folder)
    labels = torch.arange(48) % 6
    lines = ["class-1/image-0-0.jpg", "class-0/image-2-3.jpg 4", "000000007", "/data/class-1/image-1-1.jpg", "7"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    kept = listed_labels(shards, labels, str(tmp_path / "list.txt"))
    assert torch.nonzero(kept >= 0).flatten().tolist() == [1, 7, 23, 46]
    assert torch.equal(kept[kept >= 0], labels[[1, 7, 23, 46]])
    for line, says in (
        ("image-0-0.jpg", "is not one sample"),
        ("class-9/image-0-0.jpg", "is not one"),
        ("48", "is not"),
    ):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(ValueError, match=says):
            listed_labels(shards, labels, str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="cannot be read"):
        listed_labels(shards, labels, str(tmp_path / "none.txt"))
    listed = Finetune(labels_file=str(tmp_path / "keys.txt"), batch_size=6, epochs=1)
    (tmp_path / "keys.txt").write_text("\n".join(map(str, range(0, 24, 2))))
    assert run(subject_of(*sets), tmp_path, replace(listed, lr=(0.01,))).facts["num_train"] == 12


@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_symmetric_noise_draws_a_share_again_and_asymmetric_noise_flips_it(
    num_classes: int, share: float, seed: int
) -> None:
    labels = torch.arange(600) % num_classes
    labels[::7] = -1
    num_labeled = int((labels >= 0).sum())
    flipped = flip_labels(labels, share, num_classes=num_classes, seed=seed)
    assert torch.equal(flipped < 0, labels < 0)
    assert int((flipped != labels).sum()) <= int(share * num_labeled)
    assert int(flipped.max()) < num_classes
    targets = asymmetric_targets((), num_classes)
    turned = flip_labels(labels, share, num_classes=num_classes, seed=seed, targets=targets)
    changed = turned != labels
    assert int(changed.sum()) == int(share * num_labeled)
    assert torch.equal(turned[changed], (labels[changed] + 1) % num_classes)
    assert torch.equal(turned, flip_labels(labels, share, num_classes=num_classes, seed=seed, targets=targets))


def test_symmetric_noise_hits_every_class_alike() -> None:
    labels = torch.arange(20_000) % 4
    flipped = flip_labels(labels, 0.8, num_classes=4, seed=0)
    shares = torch.zeros(4, 4).index_put((labels, flipped), torch.tensor(1.0), accumulate=True) / 5000
    expected = torch.full((4, 4), 0.2) + 0.2 * torch.eye(4)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_asymmetric_noise_of_cifar_10_is_the_published_one() -> None:
    # dataloader_cifar.py of LiJunnan1992/DivideMix: {0:0, 2:0, 4:7, 7:7, 1:1, 9:1, 3:5, 5:3, 6:6, 8:8}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert asymmetric_targets(names, 10) == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    assert asymmetric_targets([], 3) == [1, 2, 0]
