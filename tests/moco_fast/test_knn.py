from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco_fast import distributed
from moco_fast.config import ModelConfig
from moco_fast.encoders import Encoder, build_encoder, normalize_images
from moco_fast.evaluate import knn
from moco_fast.evaluate.features import Features, extract, gather
from moco_fast.evaluate.knn import classify
from pipelines.batch import ImageBatch


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))


def naive_predictions(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float
) -> list[int]:
    predictions: list[int] = []
    for query in queries.astype(np.float64):
        similarity = [float(query @ row) for row in bank.astype(np.float64)]
        nearest = sorted(range(len(bank)), key=lambda row: -similarity[row])[:k]
        weight: dict[int, float] = defaultdict(float)
        for row in nearest:
            weight[int(labels[row])] += float(np.exp(similarity[row] / temperature))
        predictions.append(max(weight, key=lambda label: weight[label]))
    return predictions


@settings(deadline=None, max_examples=25)
@given(
    num_bank=st.integers(1, 60),
    num_queries=st.integers(1, 20),
    k=st.integers(1, 70),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_classify_is_the_papers_vote(num_bank: int, num_queries: int, k: int, temperature: float, seed: int) -> None:
    bank, queries = unit_rows(num_bank, 8, seed), unit_rows(num_queries, 8, seed + 1)
    labels = torch.randint(5, (num_bank,), generator=torch.Generator().manual_seed(seed))
    votes = classify(bank, labels, queries, num_classes=5, k=k, temperature=temperature)
    assert votes.predictions.tolist() == naive_predictions(
        bank.numpy(), labels.numpy(), queries.numpy(), k, temperature
    )
    assert votes.neighbours.shape == (num_queries, min(k, num_bank))
    torch.testing.assert_close(votes.similarities[:, 0], (queries @ bank.T).amax(dim=1))


def test_classify_in_chunks_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = unit_rows(50, 8, 0), unit_rows(33, 8, 1)
    labels = torch.arange(50) % 4
    whole = classify(bank, labels, queries, num_classes=4, k=7, temperature=0.1)
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", 50 * 5)
    chunked = classify(bank, labels, queries, num_classes=4, k=7, temperature=0.1)
    assert torch.equal(whole.predictions, chunked.predictions)
    assert torch.equal(whole.neighbours, chunked.neighbours)


def test_a_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow() -> None:
    bank, queries = unit_rows(40, 4, 0), unit_rows(30, 4, 1)
    labels = torch.arange(40) % 7
    votes = classify(bank, labels, queries, num_classes=7, k=40, temperature=1e-4)
    assert torch.equal(votes.predictions, labels[(queries @ bank.T).argmax(dim=1)])


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar", dim=8))


def image_batches(sizes: list[int], *, first: int = 0) -> Iterator[ImageBatch]:
    generator = torch.Generator().manual_seed(first)
    for size in sizes:
        index = torch.arange(first, first + size)
        images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
        yield ImageBatch(images=images, index=index, label=index % 3)
        first += size


def test_extract_gives_the_backbone_s_features_in_eval_mode(encoder: Encoder) -> None:
    batches = list(image_batches([4, 4, 1]))
    found = extract(encoder.train(), batches, device=torch.device("cpu"))
    encoder.eval()
    with torch.no_grad():
        expected = encoder.backbone(normalize_images(torch.cat([batch.images for batch in batches])))
    torch.testing.assert_close(found.values, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert found.values.dtype == torch.float32
    assert found.index.tolist() == list(range(9))
    assert found.labels.tolist() == [0, 1, 2] * 3
    raw = extract(encoder, batches, device=torch.device("cpu"), l2_normalize=False)
    torch.testing.assert_close(raw.values, expected, rtol=1e-4, atol=1e-5)


def test_extract_gives_every_module_its_mode_back(encoder: Encoder) -> None:
    encoder.train()
    frozen = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    statistics = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    extract(encoder, image_batches([3]), device=torch.device("cpu"))
    assert not frozen.training
    assert all(module.training for module in encoder.modules() if module is not frozen)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


def test_extract_of_nothing_still_has_the_right_shape(encoder: Encoder) -> None:
    nothing = extract(encoder, [], device=torch.device("cpu"))
    assert nothing.values.shape == (0, encoder.feature_dim)
    assert len(nothing) == 0


def test_gather_settles_the_order() -> None:
    index = torch.tensor([4, 0, 2])
    found = gather(Features(values=index[:, None].float(), labels=index * 10, index=index))
    assert found.index.tolist() == [0, 2, 4]
    assert found.values[:, 0].tolist() == [0, 2, 4]
    assert found.labels.tolist() == [0, 20, 40]


def gather_uneven_shares(sizes: list[int]) -> tuple[list[int], list[int], list[list[float]]]:
    rank = distributed.rank()
    index = torch.arange(sizes[rank]) * len(sizes) + rank
    values = torch.stack([index.float(), -index.float()], dim=1)
    found = gather(Features(values=values, labels=index % 5, index=index))
    return found.index.tolist(), found.labels.tolist(), found.values.tolist()


@pytest.mark.parametrize("sizes", [[3, 2], [0, 2], [0, 0]])
def test_gather_brings_uneven_shares_together_on_every_rank(run_ranks, sizes: list[int]) -> None:
    expected = sorted(number * 2 + rank for rank, size in enumerate(sizes) for number in range(size))
    for index, labels, values in run_ranks(gather_uneven_shares, sizes):
        assert index == expected
        assert labels == [number % 5 for number in expected]
        assert values == [[number, -number] for number in expected]
