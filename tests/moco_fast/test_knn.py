import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from moco_fast import distributed
from moco_fast.config import Layer, ModelConfig
from moco_fast.encoders.encoder import Encoder, build_encoder
from moco_fast.evaluation import knn
from moco_fast.evaluation.base import Outcome, Split
from moco_fast.evaluation.features import Features, extract, gather, set_features, spread
from moco_fast.evaluation.inputs import LiveFeatures, Subject, TaskInputs
from moco_fast.evaluation.knn import classify
from moco_fast.evaluation.known import notes_on
from moco_fast.evaluation.live import measure
from moco_fast.evaluation.tasks.knn import Knn
from moco_fast.methods.momentum_contrast import MomentumContrast
from pipelines.batch import Batch
from pipelines.config import Backend, DataConfig
from pipelines.world import World
from shards.ground.progress import ProgressBars
from shards.sets import open_set
from shards.sets.manifest import Manifest
from shards.tools.beton import write_beton


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
    assert votes.neighbors.shape == (num_queries, min(k, num_bank))
    torch.testing.assert_close(votes.similarities[:, 0], (queries @ bank.T).amax(dim=1))


def test_classify_in_chunks_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = unit_rows(50, 8, 0), unit_rows(33, 8, 1)
    labels = torch.arange(50) % 4
    whole = classify(bank, labels, queries, num_classes=4, k=7, temperature=0.1)
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", 50 * 5)
    chunked = classify(bank, labels, queries, num_classes=4, k=7, temperature=0.1)
    assert torch.equal(whole.predictions, chunked.predictions)
    assert torch.equal(whole.neighbors, chunked.neighbors)


@given(num_bank=st.integers(1, 40), k=st.integers(1, 45), rows=st.integers(1, 41), seed=st.integers(0, 100))
def test_a_bank_that_comes_in_parts_votes_the_same(num_bank: int, k: int, rows: int, seed: int) -> None:
    bank, queries = unit_rows(num_bank, 8, seed), unit_rows(9, 8, seed + 1)
    labels = torch.arange(num_bank) % 4
    whole = classify(bank, labels, queries, num_classes=4, k=k, temperature=0.1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(knn, "rows_at_once", lambda values, device: rows)
        parts = classify(bank, labels, queries, num_classes=4, k=k, temperature=0.1)
    assert torch.equal(whole.neighbors, parts.neighbors)
    assert torch.equal(whole.predictions, parts.predictions)
    torch.testing.assert_close(whole.similarities, parts.similarities)


def test_a_tiny_temperature_is_the_nearest_neighbor_and_does_not_overflow() -> None:
    bank, queries = unit_rows(40, 4, 0), unit_rows(30, 4, 1)
    labels = torch.arange(40) % 7
    votes = classify(bank, labels, queries, num_classes=7, k=40, temperature=1e-4)
    assert torch.equal(votes.predictions, labels[(queries @ bank.T).argmax(dim=1)])


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast(dim=8))


def image_batches(sizes: list[int], *, first: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(first)
    for size in sizes:
        index = torch.arange(first, first + size)
        images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
        yield Batch(views=(images,), index=index, label=index % 3)
        first += size


def test_extract_gives_the_backbone_s_features_in_eval_mode(encoder: Encoder) -> None:
    batches = list(image_batches([4, 4, 1]))
    found = extract(encoder.train(), batches, device=torch.device("cpu"))
    encoder.eval()
    with torch.no_grad():
        expected = encoder.features(torch.cat([batch.views[0] for batch in batches]), "backbone")
    torch.testing.assert_close(found.values, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert found.values.dtype == torch.float32
    assert found.index.tolist() == list(range(9))
    assert found.labels.tolist() == [0, 1, 2] * 3
    raw = extract(encoder, batches, device=torch.device("cpu"), l2_normalize=False)
    torch.testing.assert_close(raw.values, expected, rtol=1e-4, atol=1e-5)
    of_head = extract(encoder, batches, device=torch.device("cpu"), layer="head", l2_normalize=False)
    torch.testing.assert_close(of_head.values, encoder.head(expected).detach(), rtol=1e-4, atol=1e-5)


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
    assert extract(encoder, [], device=torch.device("cpu"), layer="head").values.shape == (0, encoder.dim)
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


CPU = torch.device("cpu")
KNN = Knn(k=(5,), temperature=(0.1,)).settled(None)


def knn_of(
    encoder: Encoder,
    bank: Path | str,
    queries: Path | str,
    knn: Knn = KNN,
    *,
    backend: Backend = "dali",
    world: World = World(),
) -> Outcome:
    subject = Subject(
        encoder=encoder,
        sets={"train": open_set(bank), "test": open_set(queries)},
        size=32,
        crop=1.0,
        data=DataConfig(shards=str(bank), batch_size=50 * world.world_size, backend=backend, num_threads=1),
        device=CPU,
        world=world,
    )
    [outcome] = measure([knn], subject, at_most={})
    return outcome


def top1(outcome: Outcome) -> float:
    return outcome.figures["top1"].value


@pytest.mark.parametrize(("layer", "dim"), [("backbone", 128), ("head", 8)])
def test_evaluate_knn_agrees_with_a_plain_loop(encoder: Encoder, packed_demo: Any, layer: Layer, dim: int) -> None:
    bank, queries = (
        set_features(
            encoder,
            open_set(shards),
            layer=layer,
            size=32,
            crop=1.0,
            data=DataConfig(shards=str(shards), batch_size=64),
            device=CPU,
        )
        for shards in (packed_demo.train, packed_demo.val)
    )
    predictions = naive_predictions(bank.values.numpy(), bank.labels.numpy(), queries.values.numpy(), 5, 0.1)
    result = knn_of(encoder, packed_demo.train, packed_demo.val, replace(KNN, layer=layer))
    assert bank.values.shape == (288, dim)
    assert top1(result) == np.mean(np.array(predictions) == queries.labels.numpy())
    assert (result.facts, result.notes) == ({"num_bank": 288, "num_queries": 72}, ())
    assert 1 / 18 < top1(result) < 1


@pytest.fixture(scope="module")
def beton(packed_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("beton") / "val.beton"
    write_beton(packed_demo.val, out, workers=1, progress=ProgressBars(enabled=False))
    return out


@pytest.mark.parametrize("backend", ["torch", "ffcv", "auto"])
def test_features_are_the_same_whatever_decodes(
    encoder: Encoder, packed_demo: Any, beton: Path, backend: Backend
) -> None:
    of_dali, of_other = (
        set_features(
            encoder,
            open_set(shards),
            layer="backbone",
            size=32,
            crop=0.875,
            data=DataConfig(shards="", batch_size=40, backend=name, num_threads=1),
            device=CPU,
        )
        for shards, name in ((packed_demo.val, "dali"), (beton if backend == "ffcv" else packed_demo.val, backend))
    )
    assert torch.equal(of_dali.index, of_other.index)
    assert torch.equal(of_dali.labels, of_other.labels)
    # Backends read the crop's border differently: some levels in the outermost pixels.
    assert (of_dali.values * of_other.values).sum(dim=1).min() > 0.995
    if backend != "auto":
        assert not torch.equal(of_dali.values, of_other.values)


def test_a_run_from_a_beton_is_evaluated_on_a_folder_of_shards(encoder: Encoder, packed_demo: Any, beton: Path) -> None:
    result = knn_of(encoder, beton, packed_demo.val, replace(KNN, k=(1,)), backend="ffcv")
    assert result.facts == {"num_bank": 72, "num_queries": 72}


def test_an_evaluation_parses_the_manifest_of_each_set_once(
    encoder: Encoder, packed_demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    def counting(path: Any, read: Any = Manifest.read) -> Manifest:
        parsed.append(str(path))
        return read(path)

    monkeypatch.setattr(Manifest, "read", counting)
    knn_of(encoder, packed_demo.train, packed_demo.val, replace(KNN, max_bank=40))
    assert sorted(parsed) == sorted([str(packed_demo.train), str(packed_demo.val)])


def test_a_sample_s_nearest_neighbor_is_itself(encoder: Encoder, packed_demo: Any) -> None:
    assert top1(knn_of(encoder, packed_demo.train, packed_demo.train, replace(KNN, k=(1,)))) > 0.99


def test_a_bank_smaller_than_k_is_noted(encoder: Encoder, packed_demo: Any) -> None:
    result = knn_of(encoder, packed_demo.train, packed_demo.val, replace(KNN, k=(200,), max_bank=30))
    assert result.facts["num_bank"] == 30
    assert "the bank holds 30" in result.notes[0]


@pytest.mark.parametrize(("max_bank", "at_most", "num_bank"), [(None, {}, 288), (9, {}, 9), (9, {"train": 5}, 5)])
def test_classes_that_the_bank_lacks_are_noted(
    encoder: Encoder, packed_demo: Any, max_bank: int | None, at_most: dict[Split, int], num_bank: int
) -> None:
    train = open_set(packed_demo.train)
    subject = Subject(
        encoder=encoder,
        sets={"train": train, "test": open_set(packed_demo.val)},
        size=32,
        crop=1.0,
        data=DataConfig(shards=str(packed_demo.train)),
        device=CPU,
    )
    task = replace(KNN, max_bank=max_bank)
    inputs = TaskInputs(subject=subject, source=LiveFeatures(subject=subject), at_most=at_most).for_task(task)
    labels = train.index(0)["label"][np.arange(num_bank) * 288 // num_bank]
    assert inputs.label_counts("train").tolist() == np.bincount(labels, minlength=18).tolist()
    num_unseen = 18 - len(set(labels.tolist()))
    notes = notes_on(task, inputs)
    assert [note.split()[0] for note in notes] == ([str(num_unseen)] if num_unseen else [])


def test_the_bank_is_spread_over_the_whole_set(packed_demo: Any) -> None:
    train = open_set(packed_demo.train)
    chosen = spread(train, 9)
    assert chosen is not None
    assert chosen.tolist() == [0, 32, 64, 96, 128, 160, 192, 224, 256]
    assert spread(train, 288) is None


def knn_on_this_rank(train: str, val: str) -> Outcome:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast(dim=8))
    return knn_of(encoder, train, val, world=World(rank=distributed.rank(), world_size=distributed.world_size()))


@pytest.mark.slow
def test_ranks_together_find_what_one_finds(run_ranks, encoder: Encoder, packed_demo: Any) -> None:
    alone = knn_of(encoder, packed_demo.train, packed_demo.val)
    assert run_ranks(knn_on_this_rank, str(packed_demo.train), str(packed_demo.val)) == [alone, alone]


def test_a_diverged_encoder_is_told(encoder: Encoder, packed_demo: Any) -> None:
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        knn_of(encoder, packed_demo.train, packed_demo.val)


@pytest.fixture(scope="module")
def other_shards(packed_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of another class, and the same two without a label."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "images" / "zebra").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 20, 20)).save(folder / "images" / "zebra" / f"{number}.jpg")
    for name, source in (("labeled", "images"), ("unlabeled", "images/zebra")):
        words = ["pack", str(folder / source), "--out", str(folder / name), "--workers", "1"]
        program = f"import sys; from shards.cli import main; sys.exit(main({words!r}))"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return folder


def test_shards_without_labels_are_refused(encoder: Encoder, other_shards: Path) -> None:
    unlabeled = str(other_shards / "unlabeled")
    with pytest.raises(ValueError, match="holds no labeled sample"):
        knn_of(encoder, unlabeled, unlabeled)
