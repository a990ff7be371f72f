import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco_fast.report import map as maps
from moco_fast.report.map import EmbeddingMap, draw_map, principal_components
from moco_fast.report.record import read_run
from moco_fast.report.report import write_report
from shards.sets import open_set

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (5, 5)])
def test_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(3).normal(size=shape) + 5
    centered = values - values.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    found, kept = principal_components(torch.from_numpy(values), 2)
    expected = left[:, :2] * sizes[:2]
    signs = np.sign(expected[np.abs(expected).argmax(axis=0), [0, 1]])
    assert found.numpy() == pytest.approx(expected * signs, abs=1e-9)
    assert kept == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum())


def test_equal_values_have_no_components() -> None:
    found, kept = principal_components(torch.ones(4, 3), 2)
    assert found.abs().max() == 0
    assert kept == 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def drawn(finished_run: Path, cache: Path) -> EmbeddingMap:
    return draw_map(read_run(finished_run), device=CPU, method="pca", compute=True, cache=cache)


def data_of(drawn: EmbeddingMap) -> dict[str, Any]:
    return json.loads(drawn.data)


def test_every_held_out_sample_has_a_place_a_class_and_its_picture(drawn: EmbeddingMap, finished_run: Path) -> None:
    config = read_run(finished_run).config
    assert config.eval.shards is not None
    shards = open_set(config.eval.shards)
    data = data_of(drawn)
    assert data["sample"] == list(range(72))
    assert data["label"] == shards.index(0)["label"].tolist()
    assert data["key"] == shards.index(0)["position"].tolist()
    assert drawn.groups == [(name, 4) for name in shards.class_names]
    assert [data["classes"][label] for label in data["label"]] == [drawn.groups[group][0] for group in data["group"]]
    for axis in ("x", "y"):
        assert 0 <= min(data[axis]) <= max(data[axis]) <= data["scale"]
    assert max(max(data["x"]), max(data["y"])) == data["scale"]
    sprite = Image.open(io.BytesIO(base64.b64decode(drawn.sprite.partition(",")[2])))
    columns, side = data["columns"], data["side"]
    assert sprite.size == (columns * side, -(-72 // columns) * side)
    pictures = maps.sample_pixels(shards, np.array([50]), side=side, crop=1.0, data=config.data)
    row, column = divmod(50, columns)
    shown = np.asarray(sprite)[row * side : (row + 1) * side, column * side : (column + 1) * side]
    assert np.abs(shown.astype(int) - pictures[50]).mean() < 6


def test_features_in_the_cache_are_used_and_others_only_computed_when_asked(
    drawn: EmbeddingMap, finished_run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_run(finished_run)
    with pytest.raises(ValueError, match="moco-fast report RUN --map"):
        draw_map(record, device=CPU, method="pca", compute=False, cache=tmp_path)
    monkeypatch.setattr(maps.CachedFeatures, "prepare", None)
    assert data_of(draw_map(record, device=CPU, method="pca", compute=False, cache=cache)) == data_of(drawn)


def test_no_more_points_than_the_page_can_hold(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_MAX_POINTS", 10)
    found = draw_map(read_run(finished_run), device=CPU, method="tsne", compute=True, cache=tmp_path)
    assert data_of(found)["sample"] == [72 * place // 10 for place in range(10)]
    assert "10 of 72 held-out samples" in found.caption
    assert "t-SNE" in found.caption


def test_without_labels_or_with_too_many_classes_colors_are_clusters() -> None:
    values = torch.cat(
        [torch.randn(30, 4, generator=torch.Generator().manual_seed(n)) * 0.01 + 9 * n for n in range(3)]
    )
    for labels, says in ((np.full(90, -1), "clusters"), (np.arange(90), "for there are 90 classes")):
        groups, names, words = maps._groups(values, labels, ())
        assert says in words
        assert [num for _, num in names] == np.bincount(groups).tolist()
        assert [num for _, num in names] == sorted((num for _, num in names), reverse=True)
        # No cluster reaches over two heaps.
        assert all(len(set(groups[begin : begin + 30]) & set(groups[begin + 30 :])) == 0 for begin in (0, 30))
    groups, names, words = maps._groups(values[:3], np.array([1, -1, 4]), ("a", "b"))
    assert (groups.tolist(), [name for name, _ in names], words) == ([0, 2, 1], ["b", "class 4", "no label"], "classes")


def test_text_in_a_map_cannot_leave_its_script(drawn: EmbeddingMap) -> None:
    assert "<" not in drawn.data


def test_the_report_has_a_map_where_features_are_there_and_says_how_where_not(
    drawn: EmbeddingMap, finished_run: Path, cache: Path, tmp_path: Path
) -> None:
    page = write_report(finished_run, out=tmp_path / "page.html", device=CPU, num_samples=1, cache=cache).read_text()
    assert f"Map of embeddings: {drawn.caption}" in page
    assert not re.search(r'<script[^>]*src=|\b(?:src|href)="(?!data:|#)', page)
    other = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(other / "checkpoints")
    page = write_report(other, device=CPU, num_samples=1, with_map=True, cache=cache).read_text()
    assert "There is no map: " in page
    assert "<script" not in page
