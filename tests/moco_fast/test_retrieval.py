"""Retrieval against scikit-learn, plain loops, and the protocol of the Oxford and Paris buildings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn.functional import normalize

import shards
from moco_fast.evaluation import retrieval
from moco_fast.evaluation.retrieval import OfPairs, SameLabel, match, rank, read_pairs
from moco_fast.evaluation.tasks.retrieval import Retrieval
from shards.sets import ShardSet
from tests.moco_fast.task_inputs import MadeUp, blobs

CPU = torch.device("cpu")


def drawn(num_queries: int, num_database: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return unit vectors of 5 numbers."""
    generator = torch.Generator().manual_seed(seed)
    queries, database = (normalize(torch.randn(num, 5, generator=generator)) for num in (num_queries, num_database))
    return queries, database


@pytest.mark.parametrize(("chunk", "rows"), [(1 << 24, 40), (100, 7)])
@pytest.mark.parametrize("itself", [False, True])
def test_precision_and_recall_are_scikit_learns(
    itself: bool, chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(retrieval, "rows_at_once", lambda values, device: rows)
    queries, database = drawn(30, 40)
    labels, of_database = torch.arange(30) % 6, torch.arange(40) % 4  # nothing is relevant to the classes 4 and 5
    if itself:
        database, of_database = queries, labels
    relevance = SameLabel(queries=labels, database=of_database, itself=itself)
    found = rank(queries, database, relevance, ks=(1, 3), precision="steps")
    for query in range(30):
        keep = np.array([not itself or row != query for row in range(len(database))])
        similar = (queries[query] @ database.T).numpy()[keep]
        relevant = (labels[query] == of_database).numpy()[keep]
        if not relevant.any():
            assert (found.has_relevant[query], found.average_precision[query]) == (0, 0)
            continue
        expected = average_precision_score(relevant, similar)
        assert found.average_precision[query].item() == pytest.approx(expected)
        nearest = np.argsort(-similar)
        assert found.found[query].tolist() == [relevant[nearest[:k]].any() for k in (1, 3)]
    shared = [rank(queries, database, relevance, ks=(1,), precision="steps", share=(part, 3)) for part in range(3)]
    together = torch.stack([part.average_precision for part in shared]).sum(dim=0)
    assert torch.equal(together, found.average_precision)


def published(order: list[int], ok: set[int], junk: set[int]) -> float:
    """Return the area under a list without its junk, trapezoid by trapezoid (Philbin et al. 2007)."""
    area, before, num_found = 0.0, (0.0, 1.0), 0
    for number, row in enumerate((row for row in order if row not in junk), 1):
        num_found += row in ok
        recall, precision = num_found / len(ok), num_found / number
        area += (recall - before[0]) * (precision + before[1]) / 2
        before = recall, precision
    return area


@given(
    num=st.integers(3, 25),
    seed=st.integers(0, 200),
    marks=st.lists(st.sampled_from(["ok", "junk", ""]), min_size=25, max_size=25),
)
def test_pairs_are_counted_as_published(num: int, seed: int, marks: list[str]) -> None:
    queries, database = drawn(1, num, seed)
    ok, junk = ({row for row in range(num) if marks[row] == mark} for mark in ("ok", "junk"))
    relevance = OfPairs(relevant=[sorted(ok)], junk=[sorted(junk)], num_database=num, device=CPU)
    found = rank(queries, database, relevance, ks=(1, 2), precision="trapezoids")
    order = (queries @ database.T)[0].argsort(descending=True, stable=True).tolist()
    expected = published(order, ok, junk) if ok else 0
    assert found.average_precision.item() == pytest.approx(expected)
    assert found.has_relevant.item() == bool(ok)
    left = [row for row in order if row not in junk]
    assert found.found[0].tolist() == [bool(ok & set(left[:k])) for k in (1, 2)]


# The task --------------------------------------------------------------------------------------------------------


def by_hand(inputs: MadeUp, database: Literal["train", "test"]) -> list[npt.NDArray[np.bool_]]:
    """Return for each test sample whether the samples of the database are of its class, the most similar first."""
    (queries, labels), (values, of_values) = inputs.test, inputs.train if database == "train" else inputs.test
    similar = (normalize(queries) @ normalize(values).T).numpy()
    found: list[npt.NDArray[np.bool_]] = []
    for query in range(len(queries)):
        order = [row for row in np.argsort(-similar[query]) if database == "train" or row != query]
        found.append((of_values[order] == labels[query]).numpy())
    return found


@pytest.mark.parametrize("database", ["train", "test"])
def test_the_task_s_figures_are_those_of_plain_loops(database: Literal["train", "test"]) -> None:
    inputs = MadeUp(train=blobs(60), test=blobs(30, seed=1), num_classes=5)
    inputs.test[1][0] = 4  # alone in its class
    outcome = Retrieval(database=database, k=(1, 4)).measure(inputs)
    hits = by_hand(inputs, database)[1:]
    precisions = [np.mean([of.cumsum()[n] / (n + 1) for n in np.flatnonzero(of)]) for of in hits]
    assert outcome.figures["map"].value == pytest.approx(np.mean(precisions))
    assert outcome.figures["recall_at_1"].value == pytest.approx(np.mean([of[0] for of in hits]))
    assert outcome.figures["recall_at_4"].value == pytest.approx(np.mean([of[:4].any() for of in hits]))
    assert outcome.figures["recall_at_4"].num_trials == 29
    assert outcome.facts == {"num_queries": 29, "num_database": 60 if database == "train" else 30}
    assert outcome.notes == ("left out: 1 query, to which nothing in the database is relevant",)


def test_labels_that_do_not_meet_are_a_reason_against_it() -> None:
    values, _ = blobs(4)
    inputs = MadeUp(train=blobs(20), test=(values, torch.arange(4)), num_classes=4)
    assert Retrieval().why_not(inputs) is None
    assert "nothing to find" in str(Retrieval(database="test").why_not(inputs))
    apart = replace(inputs, train=(values, torch.full((4,), 4)), num_classes=5)
    assert "nothing to find" in str(Retrieval().why_not(apart))
    with pytest.raises(ValueError, match="nothing to find"):
        Retrieval().measure(apart)


# Pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buildings(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Six images, two of which have the same name in different folders."""
    folder = tmp_path_factory.mktemp("buildings")
    rng = np.random.default_rng(0)
    for name in ("a/one.jpg", "a/two.jpg", "a/three.jpg", "b/one.jpg", "b/four.jpg", "b/five.jpg"):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    shards.pack(shards.PackConfig(sources=(str(folder / "images"),), out=str(folder / "packed"), workers=1))
    return shards.open(str(folder / "packed"))


def written(path: Path, *pairs: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return str(path)


def test_pairs_name_images_as_they_were_packed(buildings: ShardSet, tmp_path: Path) -> None:
    path = written(
        tmp_path / "pairs.jsonl",
        {"query": "b/one.jpg", "relevant": ["two.jpg", "a/one.jpg"], "junk": ["four.jpg"]},
        {"query": "two.jpg", "relevant": []},
        {"query": "five.jpg", "relevant": ["three.jpg"]},
    )
    entry = buildings.manifest.shards[0]
    names = (Path(buildings.where) / f"{entry.stem}.sources.txt").read_text().splitlines()

    def numbers(*wanted: str) -> list[int]:
        return [next(row for row, name in enumerate(names) if name.endswith(each)) for each in wanted]

    rows, relevance = match(read_pairs(path), buildings, buildings)
    assert rows == numbers("b/one.jpg", "five.jpg")
    assert relevance.relevant == [numbers("two.jpg", "a/one.jpg"), numbers("three.jpg")]
    assert relevance.junk == [numbers("four.jpg", "b/one.jpg"), numbers("five.jpg")]
    task = Retrieval(pairs=path, database="test")
    task.validate()
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    inputs = MadeUp(train=blobs(5), test=(values, torch.full((6,), -1)), num_classes=0)
    inputs.set_of = lambda split: buildings
    assert task.why_not(inputs) is None
    outcome = task.measure(inputs)
    similar = normalize(values)[rows] @ normalize(values).T
    expected = [
        published(of.argsort(descending=True).tolist(), set(ok), set(junk))
        for of, ok, junk in zip(similar, relevance.relevant, relevance.junk, strict=True)
    ]
    assert outcome.figures["map"].value == pytest.approx(np.mean(expected))
    assert outcome.facts == {"num_queries": 2, "num_database": 6}
    assert outcome.notes[0].startswith("left out: 1 query,")


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ({"query": "six.jpg", "relevant": ["two.jpg"]}, "'six.jpg' is the name of no image"),
        ({"query": "two.jpg", "relevant": ["one.jpg"]}, "'one.jpg' is the name of several images"),
        ({"query": "wo.jpg", "relevant": ["four.jpg"]}, "'wo.jpg' is the name of no image"),
    ],
)
def test_names_that_are_of_no_image_or_of_several_are_refused(
    pair: dict[str, Any], says: str, buildings: ShardSet, tmp_path: Path
) -> None:
    task = Retrieval(pairs=written(tmp_path / "pairs.jsonl", pair))
    inputs = MadeUp(train=blobs(5), test=blobs(6), num_classes=4)
    inputs.set_of = lambda split: buildings
    assert says in str(task.why_not(inputs))


def test_a_set_that_does_not_say_names_is_refused(packed_demo: Any, buildings: ShardSet, tmp_path: Path) -> None:
    [shard] = (path for path in packed_demo.val.iterdir() if path.suffix == ".tar")
    for name in (shard.name, f"{shard.stem}.index.npy", "manifest.json"):
        (tmp_path / name).symlink_to(packed_demo.val / name)
    pairs = read_pairs(written(tmp_path / "pairs.jsonl", {"query": "two.jpg", "relevant": ["four.jpg"]}))
    with pytest.raises(ValueError, match="does not say what its images were called"):
        match(pairs, buildings, shards.open(str(tmp_path)))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"relevant": []}', '{"query": 1, "relevant": ["a"]}', '{"query": "a", "relevant": "b"}']
)
def test_a_file_that_is_none_of_pairs_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "relevant": ["b"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 3 is not an object such as"):
        Retrieval(pairs=str(path)).validate()


def test_a_file_of_pairs_without_anything_to_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names nothing relevant"):
        read_pairs(written(tmp_path / "pairs.jsonl", {"query": "a"}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_pairs(str(tmp_path / "absent"))
