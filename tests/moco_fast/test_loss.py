import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.methods.loss import feature_std, info_nce, info_nce_in_batch

shapes = {"batch": st.integers(1, 7), "size": st.integers(1, 20), "dim": st.integers(2, 9)}


def unit(seed, *shape):
    rows = np.random.default_rng(seed).standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def naive_info_nce(queries, keys, dictionary, temperature):
    """The paper's algorithm 1 in float64: the loss of each query, its gradient, and the most similar candidate."""
    losses, gradients, picks = [], [], []
    for q, k in zip(queries, keys, strict=True):
        candidates = np.stack([k, *dictionary])
        logits = candidates @ q / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses.append(-np.log(p[0]))
        picks.append(logits.argmax())
        p[0] -= 1
        gradients.append(candidates.T @ p / temperature / len(queries))
    return np.mean(losses), np.stack(gradients), np.array(picks)


@given(**shapes, temperature=st.floats(0.05, 2), seed=st.integers(0, 2**32 - 1))
def test_info_nce_is_the_papers(batch, size, dim, temperature, seed):
    queries, keys, dictionary = unit(seed, batch, dim), unit(seed + 1, batch, dim), unit(seed + 2, size, dim)
    tensor = torch.tensor(queries, requires_grad=True)
    loss, watched = info_nce(tensor, torch.tensor(keys), torch.tensor(dictionary), temperature)
    loss.backward()
    expected, gradient, picks = naive_info_nce(queries, keys, dictionary, temperature)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(watched["accuracy"], (picks == 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(watched["similarity_positive"], (queries * keys).sum(1).mean(), atol=1e-12)
    np.testing.assert_allclose(watched["similarity_negative"], (queries @ dictionary.T).mean(), atol=1e-12)
    assert not any(value.requires_grad for value in watched.values())


def test_info_nce_equals_the_authors_cross_entropy_in_float32():
    queries, keys, dictionary = (torch.tensor(unit(n, size, 128)).float() for n, size in enumerate((32, 32, 4096)))
    queries.requires_grad_()
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ dictionary.T], dim=1) / 0.07
    reference = F.cross_entropy(logits, torch.zeros(32, dtype=torch.int64))
    loss, _ = info_nce(queries, keys, dictionary, 0.07)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(each, queries)[0] for each in (loss, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@given(
    batch=st.integers(1, 6),
    world_size=st.integers(1, 4),
    dim=st.integers(2, 9),
    temperature=st.floats(0.05, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_info_nce_in_batch_is_the_papers_with_the_other_keys_as_dictionary(batch, world_size, dim, temperature, seed):
    queries, candidates = unit(seed, batch, dim), unit(seed + 1, batch * world_size, dim)
    rank = seed % world_size
    tensor, keys = torch.tensor(queries, requires_grad=True), torch.tensor(candidates, requires_grad=True)
    loss, watched = info_nce_in_batch(tensor, keys, rank * batch, temperature)
    loss.backward()
    losses, gradients, hits, negatives = [], [], [], []
    for row, q in enumerate(queries):
        own = rank * batch + row
        others = np.delete(candidates, own, axis=0)
        value, gradient, picks = naive_info_nce(q[None], candidates[own : own + 1], others, temperature)
        losses.append(value)
        gradients.append(gradient[0] / batch)
        hits.append(picks[0] == 0)
        negatives.extend(others @ q)
    np.testing.assert_allclose(loss.item(), np.mean(losses), rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(tensor.grad.numpy(), np.stack(gradients), rtol=1e-7, atol=1e-7)
    assert keys.grad.abs().sum() > 0 or len(candidates) == 1
    np.testing.assert_allclose(watched["accuracy"], np.mean(hits), rtol=1e-6)
    np.testing.assert_allclose(watched["similarity_negative"], np.mean(negatives or [0]), atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_similarities_stay_finite(sign):
    queries = torch.tensor([[1.0, 0.0]], requires_grad=True)
    keys = torch.tensor([[float(sign), 0.0]])
    loss, watched = info_nce(queries, keys, -keys, 0.001)
    loss.backward()
    assert loss.item() == pytest.approx(0 if sign == 1 else 2000)
    assert watched["accuracy"].item() == (sign == 1)
    assert queries.grad.isfinite().all()


@given(batch=st.integers(1, 9), dim=st.integers(2, 9), seed=st.integers(0, 1000))
def test_feature_std_is_the_mean_spread_over_the_batch(batch, dim, seed):
    queries = unit(seed, batch, dim)
    np.testing.assert_allclose(feature_std(torch.tensor(queries)), queries.std(axis=0).mean(), atol=1e-12)


def test_feature_std_tells_collapse_from_spread():
    assert feature_std(torch.tensor(unit(0, 1, 64)).expand(100, 64)).item() == pytest.approx(0, abs=1e-9)
    assert feature_std(torch.tensor(unit(0, 5000, 64))).item() == pytest.approx(1 / 8, rel=0.02)


def test_an_encoder_that_gives_the_same_for_all_tells_none_apart():
    same = torch.tensor([[1.0, 0.0]])
    _, watched = info_nce(same.repeat(4, 1), same.repeat(4, 1), same.repeat(6, 1), 0.2)
    assert watched["accuracy"] == 0
    _, watched = info_nce_in_batch(same.repeat(4, 1), same.repeat(4, 1), 0, 0.2)
    assert watched["accuracy"] <= 0.25
