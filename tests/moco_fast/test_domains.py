"""Heads tested on other domains, against scikit-learn and heads that are restricted by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from moco_fast.evaluation.linear import train_cached
from moco_fast.evaluation.tasks.domains import Domains
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.evaluation.tasks.logistic import Logistic
from tests.moco_fast.task_inputs import MadeUp, blobs

NAMES = ("n01", "n02", "n03", "n04")


def made_up(**changes: Any) -> MadeUp:
    """Four classes; `far` has three of them in another order, and one that the training set lacks."""
    values, labels = blobs(80, seed=2, apart=0.7)
    order = ("n03", "n09", "n01", "n02")
    renumbered = torch.tensor([2, 3, 0, 1])[labels]  # n04 becomes n09
    inputs = MadeUp(train=blobs(300), test=blobs(120, seed=1), num_classes=4)
    inputs.names.update(train=NAMES, test=NAMES, far=order, same=NAMES)
    inputs.more.update(far=(values, renumbered), same=blobs(50, seed=3))
    return replace(inputs, **changes)


def shares(scores: np.ndarray, labels: np.ndarray, classes: list[int]) -> float:
    """Return the share of samples of some classes whose class scores highest among these."""
    rows = np.isin(labels, classes)
    return float(np.mean(np.array(classes)[scores[rows][:, classes].argmax(axis=1)] == labels[rows]))


def test_classes_are_found_by_name_and_compete_among_themselves() -> None:
    inputs = made_up()
    task = Domains(domains=("far=shards/far", "same=shards/same"), epochs=2)
    outcome = task.measure(inputs)
    head, chosen, _ = train_cached(Linear(epochs=2).settled(None), inputs)

    def scores(values: torch.Tensor) -> np.ndarray:
        return head.heads.logits(head.scaled(values))[:, 0].numpy()

    labels = inputs.test[1].numpy()
    of_test = scores(inputs.test[0])
    of_far, far_labels = scores(inputs.more["far"][0]), blobs(80, seed=2, apart=0.7)[1].numpy()
    expected = {
        "in_domain": shares(of_test, labels, [0, 1, 2, 3]),
        "top1_far": shares(of_far, far_labels, [0, 1, 2]),
        "in_domain_far": shares(of_test, labels, [0, 1, 2]),
        "top1_same": shares(scores(inputs.more["same"][0]), inputs.more["same"][1].numpy(), [0, 1, 2, 3]),
    }
    expected["mean"] = (expected["top1_far"] + expected["top1_same"]) / 2
    assert {name: figure.value for name, figure in outcome.figures.items()} == pytest.approx(expected)
    assert outcome.chosen == {"lr": chosen["lr"]}
    num_unknown = int((far_labels == 3).sum())
    assert outcome.notes == (f"left out: {num_unknown} samples of far, of classes that the training set lacks",)
    assert outcome.facts == {"num_test": 120, "num_far": 80 - num_unknown, "num_same": 50}
    unrestricted = (of_far.argmax(axis=1) == far_labels)[far_labels < 3].mean()
    assert expected["top1_far"] > unrestricted


def test_the_logistic_head_is_scikit_learns() -> None:
    inputs = made_up()
    outcome = Domains(domains=("far=shards/far",), head="logistic", num_c=8).measure(inputs)
    theirs = LogisticRegression(C=outcome.chosen["c"], tol=1e-6, max_iter=5000).fit(*map(np.asarray, inputs.train))
    far_labels = blobs(80, seed=2, apart=0.7)[1].numpy()
    found = theirs.decision_function(inputs.more["far"][0].numpy())
    assert outcome.figures["top1_far"].value == pytest.approx(shares(found, far_labels, [0, 1, 2]), abs=0.02)
    alone = Logistic(num_c=8).measure(inputs)
    assert (outcome.figures["in_domain"], outcome.chosen) == (alone.figures["top1"], alone.chosen)


def test_sets_without_a_common_class_are_a_reason_against_it() -> None:
    inputs = made_up()
    task = Domains(domains=("far=shards/far",))
    assert task.why_not(inputs) is None
    inputs.names["far"] = ("0", "1", "2", "3")
    assert "shards/far shares no class name with the training set" in str(task.why_not(inputs))
    assert "no set to test on is named" in str(Domains().why_not(inputs))
    inputs.names["far"] = ("0", "1", "2", "n01")
    inputs.more["far"] = (blobs(9)[0], torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="no sample of far has a class of the training set"):
        replace(task, epochs=1).measure(inputs)


def test_domains_are_sets_of_the_task_s_own() -> None:
    task = Domains.for_suite({"sketch": "data/domains/sketch"})
    assert task.more_sets() == {"sketch": "data/domains/sketch"}
    assert task.splits == {"train", "test", "sketch"}
    assert list(task.figures()) == ["mean", "in_domain", "top1_sketch", "in_domain_sketch"]
