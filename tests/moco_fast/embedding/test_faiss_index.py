"""The index of faiss: the exact one against the exact search, the other one's recall, and which vectors it is of."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_fast.cli import main
from moco_fast.embedding import faiss_index
from moco_fast.embedding.faiss_index import faiss_beside, find_faiss, write_faiss
from moco_fast.embedding.index import open_index
from moco_fast.embedding.neighbors import all_neighbors, approximate_neighbors
from moco_fast.embedding.search import nearest
from tests.moco_fast.embedding.written import CPU, naive, written


def clustered(num_rows: int, dim: int) -> np.ndarray:
    """Vectors around few centers, as encoders give them, of any length."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, dim))
    values = centers[rng.integers(0, 20, num_rows)] + 0.5 * rng.normal(size=(num_rows, dim))
    return (values * rng.uniform(0.1, 9, size=(num_rows, 1))).astype(np.float32)


@pytest.mark.parametrize("name", ["x.parquet", "x", "x.npy"])
def test_of_a_small_set_the_answers_are_those_of_the_exact_search(name: str, tmp_path: Path) -> None:
    values = clustered(200, 12)
    index = written(tmp_path / name, [values[:90], values[90:]], group_bytes=1000)
    assert write_faiss(index)[1] == "written"
    assert write_faiss(index)[1] == "was there already"
    found, note = find_faiss(open_index(index.path))
    assert found is not None
    assert (found.is_exact, note) == (True, "")
    queries = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32))
    for k in (1, 7, 500):
        similarities, rows = found.nearest(queries, k)
        expected, expected_rows = nearest(index, queries, k, device=CPU)
        assert torch.equal(rows, expected_rows)
        torch.testing.assert_close(similarities, expected, atol=1e-6, rtol=0)
    assert faiss.read_index(str(faiss_beside(index.path))).ntotal == 200


@settings(max_examples=30)  # Each writes files that are synced.
@given(data=st.data(), k=st.integers(1, 9))
def test_of_equal_ones_the_first_comes_first(
    data: st.DataObject, k: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    values = directions[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=24))]
    query = directions[data.draw(st.integers(0, 3))]
    index = written(tmp_path_factory.mktemp("equal") / "x.npy", [values])
    similarities, rows = write_faiss(index)[0].nearest(torch.from_numpy(query[None]), k)
    assert list(zip(similarities[0].tolist(), rows[0].tolist(), strict=True)) == naive(values, query, k)


def test_a_large_set_is_divided_and_nearly_all_neighbors_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = clustered(4000, 16)
    monkeypatch.setattr(faiss_index, "_EXACT_BYTES", 1000)
    index = written(tmp_path / "x.npy", [values])
    found = write_faiss(index)[0]
    assert (found.is_exact, found._made.num_lists) == (False, 102)
    queries = torch.from_numpy(clustered(4000, 16)[:100] + 0.1)
    similarities, rows = found.nearest(queries, 10)
    expected, expected_rows = nearest(index, queries, 10, device=CPU)
    hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), expected_rows.tolist(), strict=True)]
    assert sum(hits) / 1000 > 0.9
    torch.testing.assert_close(similarities[:, 0], expected[:, 0], atol=0.02, rtol=0)
    # More than the lists that it would look into hold.
    assert sorted(found.nearest(queries[:1], 4000)[1][0].tolist()) == list(range(4000))


def test_near_duplicates_are_found_by_lists_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = clustered(600, 16)
    values[[70, 200, 599]] = values[[5, 5, 300]] * 2
    monkeypatch.setattr(faiss_index, "_EXACT_BYTES", 1000)
    index = written(tmp_path / "x.npy", [values])
    found = approximate_neighbors(index, write_faiss(index)[0], k=5, threshold=0.995)
    exact = all_neighbors(index, k=5, threshold=0.995, device=CPU)
    np.testing.assert_array_equal(found.duplicates.stays, exact.duplicates.stays)
    np.testing.assert_array_equal(found.duplicates.groups(), exact.duplicates.groups())
    assert np.flatnonzero(found.duplicates.stays != np.arange(600)).tolist() == [70, 200, 599]
    assert not (found.rows == torch.arange(600)[:, None]).any(), "a row is its own neighbor"
    assert (found.rows == exact.rows).float().mean() > 0.8


@pytest.fixture
def embedding(finished_run: Path, packed_demo: Any, tmp_path: Path) -> list[str]:
    out = str(tmp_path / "x.parquet")
    return ["embed", str(finished_run), str(packed_demo.val), "--out", out, "--device", "cpu", "--backend", "dali"]


def test_the_commands_write_use_and_refuse_it(
    embedding: list[str], packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = (packed_demo.val / "shard-000000.sources.txt").read_text().splitlines()[5]
    searching = ["search", str(tmp_path / "x.parquet"), image, "-k", "4", "--device", "cpu", "--json"]

    def searched(*more: str) -> tuple[list[int], str]:
        assert main([*searching, *more]) == 0
        said = capsys.readouterr()
        return [hit["row"] for hit in json.loads(said.out)[0]["hits"]], said.err

    def embedded(*more: str) -> str:
        assert main([*embedding, "--index", "faiss", *more]) == 0
        return capsys.readouterr().out

    assert "x.parquet.faiss (exact) written" in embedded()
    rows, said = searched()
    assert "searched by" in said
    assert searched("--exact") == (rows, "")
    assert "x.parquet.faiss (exact) was there already" in embedded()
    # Other vectors in the same place.
    (tmp_path / "x.parquet").unlink()
    assert main([*embedding, "--crop", "0.5"]) == 0
    capsys.readouterr()
    _, said = searched()
    assert "x.parquet.faiss is of other vectors than" in said
    assert "searched by" not in said
    assert "x.parquet.faiss (exact) written again" in embedded("--crop", "0.5")
    assert "searched by" in searched()[1]
    with faiss_beside(tmp_path / "x.parquet").open("r+b") as file:
        file.truncate(1000)
    assert "is cut off" in searched()[1]


def test_an_index_that_was_killed_is_not_there(
    embedding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(faiss_index, "write_whole", stop)
        assert main([*embedding, "--index", "faiss"]) == 2
    assert find_faiss(open_index(tmp_path / "x.parquet")) == (None, "")
    assert main([*embedding, "--index", "faiss"]) == 0
    assert find_faiss(open_index(tmp_path / "x.parquet"))[0] is not None


def test_without_faiss_it_is_said_what_to_install(
    embedding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(faiss_index, "find_spec", lambda name: None)
        assert main([*embedding, "--index", "faiss"]) == 2
        assert "pip install 'moco-fast[faiss]'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    assert main([*embedding, "--index", "faiss"]) == 0
    monkeypatch.setattr(faiss_index, "find_spec", lambda name: None)
    assert "pip install 'moco-fast[faiss]'" in find_faiss(open_index(tmp_path / "x.parquet"))[1]


def test_exploring_goes_by_an_index_that_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = written(tmp_path / "x.npy", [clustered(600, 16)])
    words = ["explore", str(index.path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    write_faiss(index)
    assert main(words) == 0
    assert "neighbors by" not in capsys.readouterr().err
    faiss_beside(index.path).unlink()
    monkeypatch.setattr(faiss_index, "_EXACT_BYTES", 1000)
    write_faiss(index)
    assert main(words) == 0
    assert "x.npy.faiss (1 of 15 lists); --exact compares all pairs" in capsys.readouterr().err
    assert "Neighbors by" in (tmp_path / "out" / "explore.html").read_text()
    assert main([*words, "--exact"]) == 0
    assert "neighbors by" not in capsys.readouterr().err
