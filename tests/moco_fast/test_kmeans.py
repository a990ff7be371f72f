"""k-means against scikit-learn's, and agreement with classes against plain loops."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from moco_fast.evaluation import kmeans as module
from moco_fast.evaluation.kmeans import assigned_accuracy, kmeans, lloyd
from moco_fast.evaluation.tasks.cluster import Cluster
from tests.moco_fast.task_inputs import MadeUp, blobs


@pytest.mark.parametrize("chunk", [1 << 25, 100])
def test_from_the_same_start_clusters_are_scikit_learns(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    values, _ = blobs(300, num_classes=6)
    found = lloyd(values, values[:6].clone(), max_iter=300)
    theirs = KMeans(6, init=values[:6].numpy(), n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(values.numpy())
    np.testing.assert_array_equal(found.assignment, theirs.labels_)
    np.testing.assert_allclose(found.centers, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_several_starts_find_what_scikit_learn_s_do() -> None:
    values, _ = blobs(300, num_classes=6, apart=2)
    found = kmeans(values, k=6, seed=0, num_init=10, max_iter=300)
    theirs = KMeans(6, n_init=10, tol=0, random_state=0).fit(values.numpy())
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    again, other = (kmeans(values, k=6, seed=seed, num_init=1, max_iter=1) for seed in (3, 3))
    assert torch.equal(again.assignment, other.assignment)
    assert kmeans(values, k=6, seed=0, num_init=1, max_iter=300).inertia >= found.inertia


@given(seed=st.integers(0, 500), k=st.integers(2, 6), num=st.integers(6, 12))
def test_no_cluster_stays_empty_and_centers_are_means(seed: int, k: int, num: int) -> None:
    values = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
    far = torch.cat([values[:1], values[:1] + 100 * torch.arange(1, k)[:, None]])  # most of them attract nothing
    found = lloyd(values, far, max_iter=100)
    assert sorted(set(found.assignment.tolist())) == list(range(k))
    for cluster in range(k):
        expected = values[found.assignment == cluster].mean(dim=0)
        torch.testing.assert_close(found.centers[cluster], expected, rtol=1e-4, atol=1e-5)
    distances = torch.cdist(values, found.centers).square()
    chosen, nearest = distances.gather(1, found.assignment[:, None])[:, 0], distances.min(dim=1).values
    torch.testing.assert_close(chosen, nearest, rtol=1e-3, atol=1e-4)
    assert found.inertia == pytest.approx(float(nearest.sum()), rel=1e-3, abs=1e-3)


def test_equal_samples_are_no_error() -> None:
    found = kmeans(torch.ones(5, 3), k=2, seed=0, num_init=2, max_iter=10)
    assert found.inertia == 0
    assert torch.equal(found.centers, torch.ones(2, 3))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_assigned_accuracy_is_the_best_of_all_assignments(pairs: list[tuple[int, int]]) -> None:
    clusters, labels = np.array(pairs).T
    # Three of four clusters stand for the three classes, in the best of all orders.
    best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations([0, 1, 2, -1]))
    assert assigned_accuracy(clusters, labels) == pytest.approx(best)


def test_the_task_s_figures_are_those_of_plain_loops() -> None:
    inputs = MadeUp(train=blobs(40), test=blobs(90, seed=1), num_classes=4)
    outcome = Cluster(num_init=3).measure(inputs)
    labels = inputs.test[1].numpy()
    groups = kmeans(normalize(inputs.test[0]), k=4, seed=0, num_init=3, max_iter=300).assignment.numpy()
    assert outcome.figures["accuracy"].value == assigned_accuracy(groups, labels)
    shares = np.array([[np.mean((groups == g) & (labels == c)) for c in range(4)] for g in range(4)])
    of_groups, of_classes = shares.sum(axis=1), shares.sum(axis=0)
    information = sum(
        shares[g, c] * math.log(shares[g, c] / of_groups[g] / of_classes[c])
        for g in range(4)
        for c in range(4)
        if shares[g, c]
    )
    entropies = [-sum(share * math.log(share) for share in of if share) for of in (of_groups, of_classes)]
    assert outcome.figures["nmi"].value == pytest.approx(information / np.mean(entropies))
    pairs = np.array([(groups[i] == groups[j], labels[i] == labels[j]) for i, j in combinations(range(90), 2)])
    both, (group, label), num = pairs.all(axis=1).sum(), pairs.sum(axis=0), len(pairs)
    expected = group * label / num
    assert outcome.figures["ari"].value == pytest.approx((both - expected) / ((group + label) / 2 - expected))
    assert outcome.facts == {"num_samples": 90, "num_clusters": 4}
    assert 0.3 < outcome.figures["accuracy"].value < 1


def test_one_class_or_too_few_samples_are_a_reason_against_it() -> None:
    values, _ = blobs(10)
    alone = MadeUp(train=blobs(10), test=(values, torch.zeros(10, dtype=torch.int64)), num_classes=4)
    assert "samples of one class" in str(Cluster().why_not(alone))
    assert Cluster(split="train").why_not(alone) is None
    assert "--clusters is 11, but the train set holds 10" in str(Cluster(split="train", clusters=11).why_not(alone))
    assert Cluster(split="train", clusters=6).measure(alone).facts["num_clusters"] == 6
