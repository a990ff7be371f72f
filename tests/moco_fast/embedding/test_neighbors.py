"""Neighbors of all rows and groups of near-duplicates: against naive references, however the file is cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.embedding import neighbors
from moco_fast.embedding.neighbors import NearDuplicates, all_neighbors
from tests.moco_fast.embedding.written import CPU, InMemory, naive, written


@given(data=st.data(), num_rows=st.integers(2, 25), side=st.integers(1, 9), held=st.integers(1, 9))
def test_chains_of_near_duplicates_are_the_naive_ones(data: st.DataObject, num_rows: int, side: int, held: int) -> None:
    # Places on a circle, in whole steps: neighbors on it are near, and chains reach all around.
    steps = np.array(data.draw(st.lists(st.integers(0, 23), min_size=num_rows, max_size=num_rows)))
    values = np.stack([np.cos(np.pi * steps / 12), np.sin(np.pi * steps / 12)], axis=1).astype(np.float32)
    threshold = float(np.cos(1.5 * np.pi / 12))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(neighbors, "_SIDE", side)
        patched.setattr(neighbors, "_BLOCK_BYTES", {"cpu": 8 * held})
        found = all_neighbors(InMemory([values]), k=3, threshold=threshold, device=CPU)
    check_duplicates(found.duplicates, values @ values.T, threshold)


def naive_groups(num_rows: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The first row that can be reached from each row, by walking."""
    near: dict[int, set[int]] = {row: set() for row in range(num_rows)}
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    first: list[int] = []
    for row in range(num_rows):
        reached, todo = {row}, [row]
        while todo:
            found = near[todo.pop()] - reached
            reached |= found
            todo += found
        first.append(min(reached))
    return first


def naive_stays(similarities: np.ndarray, threshold: float) -> list[int]:
    """Each row's first earlier row that stays and is near, or itself, row by row."""
    stays: list[int] = []
    for row in range(len(similarities)):
        near = (other for other in range(row) if stays[other] == other and similarities[row, other] >= threshold)
        stays.append(next(near, row))
    return stays


def check_duplicates(found: NearDuplicates, similarities: np.ndarray, threshold: float) -> None:
    pairs = [(int(a), int(b)) for a, b in np.argwhere(similarities >= threshold)]
    assert found.groups().tolist() == naive_groups(len(similarities), pairs)
    assert found.stays.tolist() == naive_stays(similarities, threshold)
    expected = [1.0 if row == stays else similarities[row, stays] for row, stays in enumerate(found.stays.tolist())]
    np.testing.assert_allclose(found.similarity, expected, atol=1e-5)


@given(data=st.data(), k=st.integers(1, 6), num_rows=st.integers(2, 30), side=st.integers(1, 9), held=st.integers(1, 9))
def test_neighbors_and_groups_are_the_naive_ones(
    data: st.DataObject, k: int, num_rows: int, side: int, held: int
) -> None:
    # Few directions of exact cosines, so that many are equal: ties are where blocks would show.
    directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    values = directions[data.draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows))]
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), max_size=3)))
    index = InMemory([chunk for chunk in np.split(values, cuts) if len(chunk)])
    compared: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(neighbors, "_SIDE", side)
        patched.setattr(neighbors, "_BLOCK_BYTES", {"cpu": 8 * held})
        found = all_neighbors(index, k=k, threshold=0.5, device=CPU, tick=compared.append)
    assert sum(compared) == num_rows * (num_rows + 1) // 2
    for row in range(num_rows):
        expected = [pair for pair in naive(values, values[row], num_rows) if pair[1] != row][:k]
        assert list(zip(found.similarities[row].tolist(), found.rows[row].tolist(), strict=True)) == expected
    check_duplicates(found.duplicates, values @ values.T, 0.5)


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_files_give_the_same_as_a_naive_search(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(60, 6)) * rng.uniform(0.1, 9, size=(60, 1))).astype(np.float16)
    index = written(tmp_path / name, [values[:25], values[25:26], values[26:]], group_bytes=100)
    monkeypatch.setattr(neighbors, "_SIDE", 7)
    monkeypatch.setattr(neighbors, "_BLOCK_BYTES", {"cpu": 400})
    found = all_neighbors(index, k=5, threshold=0.6, device=CPU)
    for row in range(60):
        expected = [pair for pair in naive(values, values[row].astype(float), 60) if pair[1] != row][:5]
        assert found.rows[row].tolist() == [number for _, number in expected]
        np.testing.assert_allclose(found.similarities[row], [cosine for cosine, _ in expected], atol=1e-5)
    unit = values.astype(float) / np.linalg.norm(values.astype(float), axis=1, keepdims=True)
    assert (unit @ unit.T >= 0.6).sum() > 100, "no chains of near-duplicates"
    check_duplicates(found.duplicates, unit @ unit.T, 0.6)


def test_a_vector_of_zeros_is_near_nothing() -> None:
    values = np.array([[0, 0], [1, 0], [1, 0]], np.float32)
    found = all_neighbors(InMemory([values]), k=9, threshold=0.9, device=CPU)
    assert found.duplicates.groups().tolist() == [0, 1, 1]
    assert found.similarities.tolist() == [[0, 0], [1, 0], [1, 0]]
    assert torch.equal(found.rows, torch.tensor([[1, 2], [2, 0], [1, 0]]))
