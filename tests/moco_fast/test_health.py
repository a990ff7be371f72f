"""Health of features against plain float64 arithmetic, and what it says of features that have collapsed."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from moco_fast.api import evaluate
from moco_fast.evaluation import health
from moco_fast.evaluation.health import alignment, lidar, rankme, spectrum, spread, uniformity, view_alignment
from moco_fast.evaluation.tasks.health import Health
from tests.moco_fast.task_inputs import MadeUp, blobs

SHAPES = pytest.mark.parametrize(("num", "dim"), [(200, 12), (7, 30), (30, 30)])


def drawn(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, dim)
    return scales * torch.randn(num, dim, generator=generator) + torch.randn(dim, generator=generator)


@SHAPES
def test_the_spectrum_is_that_of_a_decomposition(num: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHUNK_ELEMENTS", 100)
    values = drawn(num, dim)
    found, plain = spectrum(values), values.double().numpy()
    singular = np.linalg.svd(plain, compute_uv=False)
    np.testing.assert_allclose(found.singular, singular, rtol=1e-6, atol=1e-6 * singular[0])
    variances = np.linalg.svd(plain - plain.mean(axis=0), compute_uv=False) ** 2 / num
    np.testing.assert_allclose(found.variances[: len(variances)], variances, rtol=1e-6, atol=1e-11)
    np.testing.assert_allclose(found.deviations, plain.std(axis=0), rtol=1e-6)
    assert found.top_share == pytest.approx(variances[0] / variances.sum())
    for share in (0.5, 0.9, 0.99):
        explained = [variances[: count + 1].sum() / variances.sum() for count in range(len(variances))]
        assert found.components(share) == next(count for count, each in enumerate(explained, 1) if each >= share)
    shares = singular / singular.sum() + 1e-7
    assert rankme(found.singular) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


@given(rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_directions_of_equal_strength_are_counted(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (40, 9))
    assert rankme(spectrum(rows @ columns.T).singular) == pytest.approx(rank, rel=1e-3)


def test_uniformity_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHUNK_ELEMENTS", 333)
    values = normalize(drawn(50, 6))
    for t in (2.0, 0.5):
        expected = torch.pdist(values.double()).square().mul(-t).exp().mean().log().item()
        assert uniformity(values, t=t) == pytest.approx(expected, rel=1e-5)


def test_alignment_is_the_mean_over_all_pairs_of_a_class() -> None:
    values, labels = normalize(drawn(40, 6)), torch.arange(40) % 7 - 1
    plain = values.double().numpy()
    pairs = [
        np.square(plain[one] - plain[other]).sum()
        for one in range(40)
        for other in range(one)
        if labels[one] == labels[other] >= 0
    ]
    assert alignment(values, labels) == pytest.approx(np.mean(pairs), rel=1e-6)
    assert alignment(values, torch.arange(40)) is None
    assert alignment(values, torch.full((40,), -1)) is None


def test_views_of_a_sample_are_compared_pair_by_pair() -> None:
    values = normalize(drawn(7 * 4, 6)).view(7, 4, 6)
    plain = values.double().numpy()
    pairs = [
        np.square(of_sample[one] - of_sample[other]).sum()
        for of_sample in plain
        for one in range(4)
        for other in range(one)
    ]
    assert view_alignment(values) == pytest.approx(np.mean(pairs), rel=1e-6)


def test_lidar_is_the_published_one_by_the_matrices_themselves() -> None:
    values = drawn(30 * 5, 6).view(30, 5, 6) + drawn(30, 6, seed=1)[:, None]
    plain = values.double().numpy()
    means = plain.mean(axis=1)
    between = sum(np.outer(each - means.mean(axis=0), each - means.mean(axis=0)) for each in means) / 30
    within = sum(np.outer(x - mean, x - mean) for mean, of_sample in zip(means, plain, strict=True) for x in of_sample)
    strengths, directions = np.linalg.eigh(within / 150 + 1e-4 * np.eye(6))
    root = directions @ np.diag(strengths**-0.5) @ directions.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root)
    shares = eigenvalues / eigenvalues.sum() + 1e-7
    assert lidar(values) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


@given(rank=st.integers(1, 5))
def test_lidar_counts_directions_that_tell_samples_apart_and_not_those_of_views(rank: int) -> None:
    # Samples at +-1 along each of `rank` directions, views apart along another one.
    centers = torch.cat([torch.eye(rank, 8), -torch.eye(rank, 8)])
    views = 5 * torch.tensor([-1.0, 1.0])[:, None] * torch.eye(8)[7]
    assert lidar(centers[:, None] + views) == pytest.approx(rank, rel=1e-3)


def test_a_set_of_images_has_lidar(finished_run: Path, tmp_path: Path) -> None:
    settings = {"views": 3, "view_samples": 12, "max_samples": 12}
    options = {"device": "cpu", "backend": "dali", "encode_batch_size": 12, "cache": str(tmp_path)}
    result = evaluate("health", finished_run, settings=settings, options=options)
    assert 1 <= result.figures["lidar"].value <= 12
    assert 0 < result.figures["view_alignment"].value < 4
    assert next(iter(result.figures)) == "rankme"


def test_spread_is_one_on_the_sphere_and_nothing_at_a_point() -> None:
    values = normalize(torch.randn(20000, 16, generator=torch.Generator().manual_seed(0)))
    assert spread(values) == pytest.approx(1, abs=0.01)
    assert spread(values[:1].expand(100, 16)) == pytest.approx(0, abs=1e-6)


def test_health_measures_all_of_it_on_the_samples_that_it_is_given() -> None:
    values, labels = blobs(300)
    values[:, 3] = 0.25
    inputs = MadeUp(train=(values, labels), test=blobs(20), num_classes=4)
    outcome = Health(max_samples=100).measure(inputs)
    some = values[torch.arange(100) * 3].double().numpy()
    assert outcome.facts == {"num_samples": 100, "dim": 8}
    norms = np.linalg.norm(some, axis=1)
    assert outcome.figures["norm"].value == pytest.approx(norms.mean())
    assert outcome.figures["norm_variation"].value == pytest.approx(norms.std() / norms.mean())
    assert outcome.figures["dead"].value == 1 / 8
    assert set(outcome.figures) == set(Health().figures())
    assert Health(split="test").measure(inputs).facts["num_samples"] == 20


def test_health_needs_no_labels_and_counts_all_samples() -> None:
    values, labels = blobs(60)
    labels[10:] = -1
    inputs = MadeUp(train=(values, torch.full_like(labels, -1)), test=(values, labels), num_classes=4)
    outcome = Health().measure(inputs)
    assert set(Health().figures()) - set(outcome.figures) == {"alignment"}
    some = Health(split="test").measure(inputs)
    assert some.facts["num_samples"] == 60
    assert some.figures["rankme"] == outcome.figures["rankme"]


def test_a_collapsed_encoder_is_seen() -> None:
    values, labels = blobs(50)
    inputs = MadeUp(train=(values[:1].expand(50, 8).clone(), labels), test=blobs(9), num_classes=4)
    figures = {name: figure.value for name, figure in Health().measure(inputs).figures.items()}
    assert figures["rankme"] == pytest.approx(1, abs=1e-3)
    assert (figures["top_component"], figures["components_90"], figures["dead"]) == (1, 1, 1)
    assert figures["uniformity"] == pytest.approx(0, abs=1e-6)
    assert figures["alignment"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="every feature is zero"):
        Health().measure(replace(inputs, train=(torch.zeros(50, 8), labels)))
    with pytest.raises(ValueError, match="holds 1: give more"):
        Health().measure(replace(inputs, train=(values[:1], labels[:1])))
