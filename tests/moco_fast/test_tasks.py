"""Tasks on features that a test makes up: against scikit-learn, torch's own optimizers or plain loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, precision_recall_curve
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torch import nn

from moco_fast.evaluation import regression
from moco_fast.evaluation.base import Task
from moco_fast.evaluation.heads import LinearHeads, Scaler, cosine, permuted_batches, steps_down
from moco_fast.evaluation.labels import choice_split, mean_per_class
from moco_fast.evaluation.linear import TrainedHeads, best_option
from moco_fast.evaluation.registry import TASKS, task_class
from moco_fast.evaluation.regression import Fitted, fit_logistic, fit_path, principal_axes
from moco_fast.evaluation.svm import average_precision, fit_all, fit_few, mean_average_precision, one_hot, scores_of
from moco_fast.evaluation.tasks.cluster import Cluster
from moco_fast.evaluation.tasks.domains import Domains
from moco_fast.evaluation.tasks.few_shot import FewShot
from moco_fast.evaluation.tasks.finetune import Finetune
from moco_fast.evaluation.tasks.health import Health
from moco_fast.evaluation.tasks.knn import Knn
from moco_fast.evaluation.tasks.label_noise import LabelNoise
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.tasks.logistic import Logistic
from moco_fast.evaluation.tasks.retrieval import Retrieval
from moco_fast.evaluation.tasks.robustness import Robustness
from moco_fast.evaluation.tasks.stages import Stages
from moco_fast.evaluation.tasks.svm import Svm
from tests.moco_fast.task_inputs import MadeUp, blobs

CPU = torch.device("cpu")


def made_up(**changes: Any) -> MadeUp:
    more = {"far": blobs(50, seed=2, apart=0.5)}
    return replace(MadeUp(train=blobs(300), test=blobs(120, seed=1), num_classes=4, more=more), **changes)


# Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_what_decides_has_a_share_of_every_class(share: float) -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3 + [3])
    fits, decides = choice_split(labels, share=share, seed=1)
    assert sorted([*fits.tolist(), *decides.tolist()]) == list(range(144))
    assert labels[decides].bincount(minlength=4).tolist() == [100 * share, 40 * share, 1, 0]
    again, other = choice_split(labels, share=share, seed=1)[1], choice_split(labels, share=share, seed=2)[1]
    assert torch.equal(decides, again)
    assert not torch.equal(decides, other)


def test_classes_of_one_sample_leave_nothing_to_decide() -> None:
    with pytest.raises(ValueError, match="no class has two samples"):
        choice_split(torch.arange(5))


def test_mean_per_class_is_scikit_learns_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 200) % 4, rng.integers(0, 4, 200)
    found = mean_per_class(torch.tensor(labels == predictions), torch.tensor(labels), num_classes=6)
    assert found == pytest.approx(balanced_accuracy_score(labels, predictions))


# kNN -------------------------------------------------------------------------------------------------------------


def test_knn_sweeps_what_it_would_measure_one_by_one() -> None:
    inputs = made_up()
    together = Knn(k=(5, 1, 40), temperature=(0.07, 0.5)).settled(None)
    outcome = together.measure(inputs)
    assert set(outcome.figures) == set(together.figures())
    for k in (5, 1, 40):
        for temperature in (0.07, 0.5):
            alone = Knn(k=(k,), temperature=(temperature,)).settled(None).measure(inputs)
            suffix = "" if (k, temperature) == (5, 0.07) else f"_k{k}" + ("_t0.5" if temperature == 0.5 else "")
            assert outcome.figures[f"top1{suffix}"] == alone.figures["top1"]
    assert outcome.facts == {"num_bank": 300, "num_queries": 120}


def test_knn_s_mean_per_class_counts_classes_alike() -> None:
    inputs = made_up()
    found = Knn(k=(1,)).settled(None).measure(inputs).figures["mean_per_class"].value
    (bank, labels), (queries, expected) = inputs.train, inputs.test
    similarity = nn.functional.normalize(queries) @ nn.functional.normalize(bank).T
    assert found == pytest.approx(balanced_accuracy_score(expected, labels[similarity.argmax(dim=1)]))


def test_knn_of_a_small_bank_lets_all_vote_and_leaves_out_the_rest() -> None:
    outcome = Knn(k=(400, 10, 500)).settled(None).measure(made_up())
    assert set(outcome.figures) == {"top1", "top1_k10", "mean_per_class"}
    assert "the bank holds 300" in outcome.notes[0]


@pytest.mark.parametrize("num_bank", [10, 20, 100])
def test_a_bank_as_large_as_one_of_the_usual_k_is_measured_once_and_shown_twice(num_bank: int) -> None:
    task = Knn().settled(None)
    figures = task.measure(made_up(train=blobs(num_bank))).figures
    assert figures["top1"] == figures[f"top1_k{num_bank}"]
    alone = Knn(k=(num_bank,)).settled(None).measure(made_up(train=blobs(num_bank)))
    assert figures["top1"] == alone.figures["top1"]


def test_a_k_that_is_named_twice_is_measured_once() -> None:
    once, twice = (Knn(k=k, temperature=(0.07,)).settled(None) for k in ((20, 5), (20, 20, 5)))
    assert twice.figures() == once.figures()
    assert twice.measure(made_up()).figures == once.measure(made_up()).figures


# Linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_heads_take_the_steps_of_torch_s_sgd(weight_decay: float) -> None:
    rates, (features, labels) = [0.1, 1.0], blobs(64)
    labels[::7] = -1
    heads = LinearHeads(8, 4, rates, momentum=0.9, weight_decay=weight_decay, seed=3, device=CPU)
    layers = [nn.Linear(8, 4) for _ in rates]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(heads.weight[0])
            layer.bias.zero_()
    assert 0.005 < heads.weight.std() < 0.02
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)
        for layer, rate in zip(layers, rates, strict=True)
    ]
    for step in range(12):
        chosen = slice(16 * (step % 4), 16 * (step % 4 + 1))
        schedule = cosine(step / 12)
        heads.step(features[chosen], labels[chosen], schedule=schedule)
        for layer, optimizer, rate in zip(layers, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = schedule * rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features[chosen]), labels[chosen], ignore_index=-1).backward()
            optimizer.step()
    for head, layer in enumerate(layers):
        torch.testing.assert_close(heads.weight[head], layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[head], layer.bias.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(heads.ranked([features], top=1)[:, 1, 0], layers[1](features).argmax(dim=1))


def test_a_batch_without_labels_teaches_nothing() -> None:
    heads = LinearHeads(8, 4, [1.0], momentum=0.9, weight_decay=0.0, seed=0, device=CPU)
    before = heads.weight.clone()
    heads.step(torch.randn(5, 8), torch.full((5,), -1), schedule=1.0)
    assert torch.equal(heads.weight, before)


def test_schedules() -> None:
    assert [round(cosine(done), 6) for done in (0, 0.5, 1)] == [1, 0.5, 0]
    down = steps_down((0.6, 0.8))
    assert [down(done) for done in (0, 0.59, 0.6, 0.79, 0.8, 0.99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_an_epoch_s_batches_are_whole_and_in_an_order_of_their_own() -> None:
    batches = [list(permuted_batches(10, 4, seed=1, epoch=epoch)) for epoch in (0, 0, 1)]
    assert [len(batch) for batch in batches[0]] == [4, 4]
    assert torch.equal(torch.cat(batches[0]), torch.cat(batches[1]))
    assert not torch.equal(torch.cat(batches[0]), torch.cat(batches[2]))
    [alone] = permuted_batches(3, 4, seed=0, epoch=0)
    assert sorted(alone.tolist()) == [0, 1, 2]


def test_a_scaler_removes_mean_and_deviation_and_what_never_changes() -> None:
    features = torch.randn(100, 3) * torch.tensor([1.0, 50.0, 0.0]) + torch.tensor([5.0, -3.0, 7.0])
    scaled = Scaler(features, torch.arange(100))(features)
    some = Scaler(features, torch.arange(50))(features)[:50]
    torch.testing.assert_close(some.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(dim=0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_fast_linear_agrees_with_scikit_learn() -> None:
    inputs = made_up(train=blobs(2000), test=blobs(4000, seed=1))
    outcome = Linear(batch_size=64).settled(None).measure(inputs)
    expected = (
        LogisticRegression(max_iter=1000).fit(*map(np.asarray, inputs.train)).score(*map(np.asarray, inputs.test))
    )
    assert abs(outcome.figures["top1"].value - expected) < 0.01
    assert 0.5 < expected < 0.99
    assert outcome.chosen["lr"] in {rate * 64 / 256 for rate in Linear().settled(None).lr or ()}
    assert "top5" not in outcome.figures
    assert outcome.facts == {"num_train": 2000, "num_test": 4000}


def test_small_sets_are_passed_over_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    monkeypatch.setattr(LinearHeads, "step", lambda _self, _features, _labels, *, schedule: steps.append(schedule))
    for task, expected in (
        (Linear(lr=(1.0,)), 1000),
        (Linear(lr=(1.0,), epochs=3), 3),
        (Linear(lr=(1.0,), min_steps=20), 20),
    ):
        steps.clear()
        task.settled(None).measure(made_up(train=blobs(256)))
        assert (len(steps), steps[0], steps == sorted(steps, reverse=True)) == (expected, 1, True)


def test_linear_chooses_the_layer_that_tells_the_classes() -> None:
    noise = {("train", "head"): torch.randn(300, 5), ("test", "head"): torch.randn(120, 5)}
    task = Linear(layer=("head", "backbone"), batch_size=64).settled(None)
    assert task.measure(made_up(layers=noise)).chosen["layer"] == "backbone"


def test_of_heads_that_samples_cannot_tell_apart_cross_entropy_chooses() -> None:
    # On 100 samples a standard error of 0.8 is 0.04.
    assert best_option({"a": (0.8, 0.9), "b": (0.77, 0.5), "c": (0.75, 0.1)}, num_samples=100) == "b"
    assert best_option({"a": (0.8, 0.9), "b": (0.77, 0.5)}, num_samples=10_000) == "a"
    assert best_option({"a": (0.8, 0.5), "b": (0.8, 0.5)}, num_samples=100) == "a"
    assert best_option({"a": (0.5, float("nan")), "b": (0.5, 2.0)}, num_samples=100) == "b"
    assert best_option({"a": (0.0, float("nan")), "b": (0.0, float("nan"))}, num_samples=1) == "a"


def test_heads_are_scored_as_torch_scores_each() -> None:
    values, labels = blobs(50)
    heads = LinearHeads(8, 4, [0.1, 1.0], momentum=0.9, weight_decay=0.0, seed=0, device=CPU)
    heads.step(values, labels, schedule=1.0)
    scores = TrainedHeads(heads=heads, scaled=lambda part: part).scores_on(values, labels)
    for head, found in enumerate(scores):
        logits = values @ heads.weight[head].T + heads.bias[head]
        share = (logits.argmax(dim=1) == labels).double().mean().item()
        assert found == pytest.approx((share, nn.functional.cross_entropy(logits, labels).item()), rel=1e-5)


def test_the_protocols_are_the_published_ones() -> None:
    # main_lincls.py of facebookresearch/moco and of facebookresearch/moco-v3 (its CONFIG.md for transformers).
    for task in (Linear(protocol="v1").settled(None), Linear(protocol="v2").settled(None)):
        assert (task.lr, task.epochs, task.batch_size, task.momentum, task.weight_decay) == ((30,), 100, 256, 0.9, 0)
    v3 = Linear(protocol="v3")
    assert (v3.settled(None).lr, v3.settled(None).epochs, v3.settled(None).batch_size) == ((0.4,), 90, 1024)
    assert v3.settled(None, is_transformer=True).lr == (12,)
    assert replace(v3, batch_size=512).settled(None).lr == (0.2,)
    rates = Linear().settled(None).lr
    assert rates is not None
    assert (len(rates), rates[0], rates[-1]) == (13, 1e-3, 10)


# Logistic regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along_axes", [False, True])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_a_fit_is_scikit_learns(c: float, along_axes: bool) -> None:
    values, labels = blobs(200, apart=0.5)
    axes = principal_axes(values.double(), device=CPU) if along_axes else None
    ours = fit_logistic(values.double(), labels, num_classes=4, c=c, max_iter=500, tolerance=1e-8, axes=axes)
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(values.double().numpy(), labels.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, rtol=2e-3, atol=2e-3)
    bias = ours.bias - ours.bias.mean()  # all biases together are free
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_ - theirs.intercept_.mean(), rtol=2e-3, atol=2e-3)


def test_axes_lead_to_the_minimum_of_features_of_very_different_scales() -> None:
    values, labels = blobs(300)
    values = values.double() * torch.logspace(-2, 2, 8, dtype=torch.float64) + 30
    values[:, 3] = 7.0  # what never changes

    def objective(fit: Fitted) -> float:
        loss = nn.functional.cross_entropy(fit.scores(values), labels)
        return (loss + 0.5 / (10 * 300) * fit.weight.square().sum()).item()

    theirs = LogisticRegression(C=10, solver="newton-cholesky", tol=1e-10, max_iter=200)
    theirs.fit(values.numpy(), labels.numpy())
    least = objective(Fitted(weight=torch.tensor(theirs.coef_), bias=torch.tensor(theirs.intercept_)))
    axes = principal_axes(values, device=CPU)
    along = fit_logistic(values, labels, num_classes=4, c=10.0, max_iter=30, axes=axes)
    without = fit_logistic(values, labels, num_classes=4, c=10.0, max_iter=30)
    assert abs(objective(along) - least) < 1e-6 < 1e-2 < objective(without) - least
    # A fit begins where the one before ended.
    again = fit_logistic(values, labels, num_classes=4, c=10.0, max_iter=1, axes=axes, start=along)
    torch.testing.assert_close(again.weight, along.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e18, 1e30])
def test_large_features_are_fitted(scale: float) -> None:
    (values, labels), test = blobs(200), blobs(100, seed=1)
    large = made_up(train=(values * scale, labels), test=(test[0] * scale, test[1]))
    assert Logistic(num_c=2).measure(large).figures["top1"].value > 0.6


def test_a_fit_that_finds_no_numbers_is_an_error() -> None:
    values, labels = blobs(200)
    with pytest.raises(ValueError, match=r"logistic regression finds no numbers: features reach 4\.\de\+18"):
        fit_logistic(values * 1e18, labels, num_classes=4, c=1.0, max_iter=10)


def test_features_that_come_in_parts_are_fitted_and_classified_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = blobs(100)
    whole = fit_logistic(values.double(), labels, num_classes=4, c=1.0, max_iter=300, tolerance=1e-7)
    predictions = whole.predict(values.double())
    assert torch.equal(predictions, whole.scores(values.double()).argmax(dim=1))
    monkeypatch.setattr(regression, "rows_at_once", lambda values, device, *, dim=0: 30)
    for axes in (None, principal_axes(values.double(), device=CPU)):
        parts = fit_logistic(values.double(), labels, num_classes=4, c=1.0, max_iter=300, tolerance=1e-7, axes=axes)
        torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole.predict(values.double()), predictions)


def test_a_path_ends_where_single_fits_do() -> None:
    values, labels = blobs(150)
    cs = [1e-4, 1e-2, 1.0]
    path = fit_path(values.double(), labels, num_classes=4, cs=cs, max_iter=300, tolerance=1e-7)
    for fit, c in zip(path, cs, strict=True):
        alone = fit_logistic(values.double(), labels, num_classes=4, c=c, max_iter=300, tolerance=1e-7)
        torch.testing.assert_close(fit.weight, alone.weight, rtol=1e-3, atol=1e-4)


def test_logistic_tests_what_scikit_learn_fits_with_the_chosen_c() -> None:
    inputs = made_up()
    outcome = Logistic(num_c=12).measure(inputs)
    theirs = LogisticRegression(C=outcome.chosen["c"], tol=1e-6, max_iter=5000).fit(*map(np.asarray, inputs.train))
    predictions = theirs.predict(np.asarray(inputs.test[0]))
    assert outcome.figures["top1"].value == pytest.approx(np.mean(predictions == np.asarray(inputs.test[1])), abs=0.01)
    expected = balanced_accuracy_score(inputs.test[1], predictions)
    assert outcome.figures["mean_per_class"].value == pytest.approx(expected, abs=0.01)
    assert len(torch.logspace(-6, 5, Logistic().num_c)) == 45


# Support vector machines -----------------------------------------------------------------------------------------


def naive_average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    # svm_helper.py, calculate_ap: precision is the best at this recall or beyond.
    order = np.argsort(-scores, kind="stable")
    hits = is_positive[order]
    points = [(hits[: n + 1].sum() / hits.sum(), hits[: n + 1].mean()) for n in range(len(hits))]
    total, before = 0.0, 0.0
    for recall, _ in points:
        if recall > before:
            total += (recall - before) * max(precision for other, precision in points if other >= recall)
            before = recall
    return total


def test_average_precision_is_the_published_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, is_positive = rng.normal(size=30), rng.random(30) < 0.3
        is_positive[0] = True
        assert average_precision(scores, is_positive) == pytest.approx(naive_average_precision(scores, is_positive))
    assert average_precision(np.array([3.0, 2, 1]), np.array([True, True, False])) == 1


def test_machines_are_scikit_learns_with_the_cost_that_cross_validation_prefers() -> None:
    values, labels = (each.numpy() for each in blobs(90, apart=0.6))
    values = values.astype(np.float64) / np.linalg.norm(values, axis=1, keepdims=True)
    costs = (0.01, 1.0)
    of_classes = one_hot(labels, num_classes=5)
    machines, chosen = fit_all(values, of_classes, costs=costs, seed=0)

    def scored(machine: Any, held: np.ndarray, expected: np.ndarray) -> float:
        return naive_average_precision(machine.decision_function(held), expected == 1)

    for label in range(4):
        targets = np.where(labels == label, 1, -1)
        options = [
            LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, random_state=0, max_iter=2000) for cost in costs
        ]
        found = [cross_val_score(each, values, targets, cv=3, scoring=scored).mean() for each in options]
        assert chosen[str(label)] == costs[int(np.argmax(found))]
        theirs = options[int(np.argmax(found))].fit(values, targets)
        np.testing.assert_allclose(
            machines[label].decision_function(values), theirs.decision_function(values), atol=1e-8
        )
    scores = scores_of(machines, values, num_classes=5)
    assert scores.shape == (90, 5)
    assert np.isneginf(scores[:, 4]).all()
    assert 0.5 < mean_average_precision(scores, of_classes) <= 1


def test_few_shots_learn_from_no_more_than_those(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = (each.numpy() for each in blobs(80))
    values, targets = values.astype(np.float64), one_hot(labels, num_classes=4)
    learned: list[np.ndarray] = []

    def fit(self: Any, samples: np.ndarray, signs: np.ndarray, plain: Any = LinearSVC.fit) -> Any:
        learned.append(samples)
        return plain(self, samples, signs)

    monkeypatch.setattr(LinearSVC, "fit", fit)
    machines = fit_few(values, targets, shots=2, costs=(0.1, 1.0), seed=(0, 2, 0))
    assert machines is not None
    assert set(machines) == {0, 1, 2, 3}
    [of_one_class] = {samples.tobytes() for samples in learned}
    drawn = [int(np.flatnonzero((values == row).all(axis=1))[0]) for row in np.frombuffer(of_one_class).reshape(-1, 8)]
    assert np.bincount(labels[drawn]).tolist() == [2, 2, 2, 2]
    assert fit_few(values, targets, shots=80, costs=(1.0,), seed=(0, 80, 0)) is None


def test_svm_measures_both_and_notes_what_is_missing() -> None:
    task = Svm(costs=(0.1, 1.0), shots=(1, 8, 90), num_draws=2).settled(None)
    outcome = task.measure(made_up())
    assert set(outcome.figures) == {"map", "top1", "map_1_shot", "map_8_shot"}
    assert outcome.figures["map_1_shot"].value < outcome.figures["map_8_shot"].value < outcome.figures["map"].value
    assert outcome.notes == ("90-shot is left out: some class has fewer than 90 training samples",)
    published = Svm(protocol="voc07").settled(None)
    assert published.costs is not None
    assert (len(published.costs), published.shots) == (18, (1, 2, 4, 8, 16, 32, 64, 96))


def label_sets(num: int, seed: int = 0, *, share_unsure: float = 0.1) -> tuple[torch.Tensor, np.ndarray]:
    """Features that point to each of their classes, and the sets of these: 1, 0, or -1 where that is not sure."""
    rng = np.random.default_rng(seed)
    sets = (rng.random((num, 4)) < 0.3).astype(np.int8)
    centers = np.random.default_rng(1000).normal(size=(4, 8))
    values = sets @ centers + 0.7 * rng.normal(size=(num, 8))
    sets[rng.random((num, 4)) < share_unsure] = -1
    return torch.tensor(values, dtype=torch.float32), sets


def several(num: int = 240, **options: Any) -> MadeUp:
    train, train_sets = label_sets(num, **options)
    test, test_sets = label_sets(num, seed=1, **options)
    none = torch.full((num,), -1)
    sets = {"train": train_sets, "test": test_sets}
    return MadeUp(train=(train, none), test=(test, none), num_classes=4, sets=sets)


def naive_voc_map(scores: np.ndarray, sets: np.ndarray) -> float:
    # test_svm.py of the benchmark's authors: a class's samples of -1 are taken out of its test.
    found = []
    for label in range(sets.shape[1]):
        kept = [row for row in range(len(sets)) if sets[row, label] != -1]
        if any(sets[row, label] == 1 for row in kept):
            positive = np.array([sets[row, label] == 1 for row in kept])
            found.append(naive_average_precision(scores[kept, label], positive))
    return sum(found) / len(found)


def test_sets_of_classes_are_measured_as_voc_does() -> None:
    inputs = several()
    train, test = inputs.sets["train"], inputs.sets["test"]
    outcome = Svm(costs=(0.1,), max_train=500).settled(None).measure(inputs)
    assert set(outcome.figures) == {"map"}
    features = [nn.functional.normalize(values).double().numpy() for values, _ in (inputs.train, inputs.test)]
    scores = np.stack(
        [
            # Difficult ones are negatives when machines learn, as in train_svm_kfold.py.
            LinearSVC(C=0.1, class_weight={1: 2, -1: 1}, dual=True, random_state=0, max_iter=2000)
            .fit(features[0], np.where(train[:, label] == 1, 1, -1))
            .decision_function(features[1])
            for label in range(4)
        ],
        axis=1,
    )
    assert outcome.figures["map"].value == pytest.approx(naive_voc_map(scores, test), abs=1e-6)
    assert outcome.figures["map"].value != pytest.approx(naive_voc_map(scores, np.abs(test)), abs=1e-4)


def test_mean_average_precision_is_voc_s_over_scikit_learn_s_curve() -> None:
    rng = np.random.default_rng(0)
    scores, sets = rng.normal(size=(60, 3)), (rng.random((60, 3)) < 0.4).astype(np.int8)
    expected = []
    for label in range(3):
        precision, recall, _ = precision_recall_curve(sets[:, label], scores[:, label])
        # Recall falls along the curve: the best precision at this recall or beyond is the best so far.
        expected.append(-np.diff(recall) @ np.maximum.accumulate(precision[:-1]))
    assert mean_average_precision(scores, sets) == pytest.approx(np.mean(expected))
    assert mean_average_precision(scores, sets) == pytest.approx(naive_voc_map(scores, sets))
    plain = [average_precision_score(sets[:, label], scores[:, label]) for label in range(3)]
    assert mean_average_precision(scores, sets) > np.mean(plain)


def test_few_shots_of_sets_draw_for_each_class_what_the_authors_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values, sets = label_sets(200)
    features = values.double().numpy()
    learned: list[tuple[np.ndarray, np.ndarray]] = []

    def fit(self: Any, samples: np.ndarray, signs: np.ndarray, plain: Any = LinearSVC.fit) -> Any:
        learned.append((samples, signs))
        return plain(self, samples, signs)

    monkeypatch.setattr(LinearSVC, "fit", fit)
    assert fit_few(features, sets, shots=5, costs=(0.1,), seed=(0, 5, 0)) is not None
    assert len(learned) == 4
    for label, (samples, signs) in enumerate(learned):
        rows = [int(np.flatnonzero((features == row).all(axis=1))[0]) for row in samples]
        assert len(set(rows)) == 5 + 3 * 5
        assert sets[rows, label].tolist() == [1] * 5 + [0] * 15
        assert signs.tolist() == [1] * 5 + [-1] * 15


def test_a_draw_that_takes_all_positives_still_has_a_cost() -> None:
    values, sets = label_sets(80)
    fewest = int((sets == 1).sum(axis=0).min())
    assert fit_few(values.double().numpy(), sets, shots=fewest, costs=(0.1, 1.0), seed=(0, 1)) is not None
    assert fit_few(values.double().numpy(), sets, shots=fewest + 1, costs=(0.1, 1.0), seed=(0, 1)) is None


def test_more_shots_of_sets_are_better_and_samples_of_which_nothing_is_known_are_left_out() -> None:
    inputs = several(400)
    inputs.sets["train"][::10] = -1
    outcome = Svm(costs=(0.01, 0.1, 1.0), shots=(1, 32), num_draws=3, max_train=None).settled(None).measure(inputs)
    assert (
        outcome.figures["map_1_shot"].value
        < outcome.figures["map_32_shot"].value
        <= outcome.figures["map"].value + 0.02
    )
    known = (inputs.sets["train"] != -1).any(axis=1)
    assert outcome.facts == {
        "num_train": int(known.sum()),
        "num_test": int((inputs.sets["test"] != -1).any(axis=1).sum()),
    }


# Stages ----------------------------------------------------------------------------------------------------------


def test_stages_are_linear_on_each() -> None:
    noise = {("train", "stage1"): torch.randn(300, 5), ("test", "stage1"): torch.randn(120, 5)}
    inputs = made_up(layers=noise)
    task = Stages(stages=(1, 5), batch_size=64)
    outcome = task.measure(inputs)
    alone = Linear(layer=("stage5",), batch_size=64).settled(None).measure(inputs)
    assert outcome.figures["stage5"] == alone.figures["top1"]
    assert outcome.figures["stage1"].value < 0.5 < outcome.figures["stage5"].value
    assert [want.layer for want in Stages(at_most=9216, stages=(2,)).wants()] == ["stage2/9216"] * 2


# All -------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Task] = {
    "knn": Knn(k=(5, 20)),
    "linear": Linear(batch_size=64, epochs=2),
    "logistic": Logistic(num_c=6),
    "svm": Svm(costs=(0.01, 1.0), shots=(3,), num_draws=1),
    "stages": Stages(stages=(4, 5), batch_size=64, epochs=2),
    "few-shot": FewShot(shots=(2, 1), way=3, queries=4, episodes=12),
    "retrieval": Retrieval(),
    "cluster": Cluster(num_init=1),
    "domains": Domains(domains=("far=shards/far",), epochs=2),
    "health": Health(),
    "robustness": Robustness(corruptions=("contrast", "fog"), severities=(1, 5), eps=(1.0, 8.0), steps=2, epochs=2),
}


# test_finetune.py and test_label_noise.py have those that train on images.
ON_FEATURES = [name for name in TASKS if name not in ("finetune", "label-noise")]


@pytest.mark.parametrize("name", [name for name in ON_FEATURES if QUICK[name].splits >= {"train", "test"}])
def test_no_task_chooses_by_the_test_set(name: str) -> None:
    task = QUICK[name].settled(None)
    inputs = made_up()
    values, labels = inputs.test
    permuted = replace(inputs, test=(values, labels[torch.randperm(len(labels), generator=torch.Generator())]))
    as_it_is, scrambled = task.measure(inputs), task.measure(permuted)
    assert as_it_is.chosen == scrambled.chosen
    assert as_it_is.figures != scrambled.figures


@pytest.mark.parametrize("name", ON_FEATURES)
def test_every_task_names_what_it_measures_and_repeats_it(name: str) -> None:
    task = QUICK[name].settled(None)
    task.validate()
    outcome = task.measure(made_up())
    assert set(outcome.figures) <= set(task.figures())
    assert next(iter(task.figures())) in outcome.figures
    assert task.measure(made_up()) == outcome
    assert task_class(name).name == name
    shares = [name for name, info in task.figures().items() if info.unit == "share"]
    assert all(0 <= outcome.figures[name].value <= 1 for name in shares if name in outcome.figures)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (Knn(k=(0,)), "--k is 0"),
        (Knn(temperature=()), "--temperature names nothing"),
        (Knn(layer="fc"), "there is no layer"),
        (Linear(lr=(1.0, -1.0)), "--lr is -1"),
        (Linear(layer=()), "--layer names nothing"),
        (Linear(epochs=0), "--epochs is 0"),
        (Linear(crop_scale=(0.5, 1.0)), "--crop-scale means nothing beside --protocol fast"),
        (Linear(protocol="v1", crop_scale=(0.5, 0.1)), "--crop-scale is 0.5 0.1, but must be two shares"),
        (Finetune(crop_scale=(0.0, 1.0)), "--crop-scale is 0 1, but must be two shares"),
        (LabelNoise(crop_scale=(0.5, 2.0)), "--crop-scale is 0.5 2, but must be two shares"),
        (Linear(protocol="v1", min_steps=5), "--min-steps 5 means nothing beside --protocol v1"),
        (Logistic(share=1.0), "--share is 1.0"),
        (Logistic(num_c=0), "--num-c is 0"),
        (Svm(costs=(0.0,)), "--costs is 0"),
        (Stages(stages=(6,)), "--stages is"),
        (Stages(batch_size=0), "--batch-size is 0"),
        (FewShot(way=1), "--way is 1"),
        (FewShot(shots=(5, 0)), "--shots is 0"),
        (FewShot(heads=()), "--heads names nothing"),
        (Retrieval(k=(0,)), "--k is 0"),
        (Cluster(clusters=1), "--clusters is 1"),
        (Domains(domains=("far",)), "--domains far is not NAME=SHARDS"),
        (Domains(domains=("far=a", "far=b")), "--domains names far twice"),
        (Domains(domains=("test=a",)), "--domains names test twice"),
        (Health(max_samples=1), "--max-samples is 1"),
        (Health(layer="fc"), "there is no layer"),
        (Robustness(corruptions=("rain",)), "--corruptions has 'rain', which is not a kind: choose gaussian_noise"),
        (Robustness(corruptions=(), attacks=()), "nothing to measure"),
        (Robustness(severities=(0,)), "--severities is"),
        (Robustness(norms=()), "--norms names nothing"),
        (Robustness(eps=(1.0, 0.0)), "--eps is 0"),
        (Robustness(eps_l2=()), "--eps-l2 names nothing"),
        (Robustness(steps=0), "--steps is 0"),
        (Robustness(max_attacked=0), "--max-attacked is 0"),
        (Robustness(corruption_seed=-1), "--corruption-seed is -1"),
        (Robustness(corrupted="nowhere"), "--corrupted nowhere is not a folder"),
        (Robustness(corrupted=".", strengths="cifar"), "--strengths cifar means nothing beside --corrupted"),
        (Robustness(corrupted=".", corruption_seed=1), "--corruption-seed 1 means nothing beside --corrupted"),
        (Robustness(corrupted=".", corruptions=()), "means nothing without --corruptions"),
    ],
)
def test_options_that_cannot_work_are_refused(task: Task, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task.validate()


def test_an_unknown_task_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="there is no task 'fly': choose knn, linear"):
        task_class("fly")
