"""Search: exact neighbors against a naive reference, and the command from images to a page."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moco_fast
from moco_fast.cli import main
from moco_fast.embedding import index
from moco_fast.embedding.index import Row, open_index
from moco_fast.embedding.search import nearest
from tests.moco_fast.embedding.written import CPU, InMemory, naive, written


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["x.parquet", "x", "x.npy", "x.safetensors"])
def test_neighbors_are_those_of_a_naive_search(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(200, 12)) * rng.uniform(0.1, 9, size=(200, 1))).astype(dtype)
    monkeypatch.setattr(index, "_CHUNK_BYTES", 1000)
    found = written(tmp_path / name, [values[:90], values[90:91], values[91:]], group_bytes=1000)
    assert len(list(found.chunks())) > 4
    for begin in (0, 1, 90, 91, 150, 200):
        chunks = list(found.chunks(begin))
        assert [first for first, _ in chunks[:1]] == [begin][: len(chunks)]
        np.testing.assert_array_equal(np.concatenate([values[:0], *(chunk for _, chunk in chunks)]), values[begin:])
    some = np.array([0, 3, 89, 90, 91, 199])
    np.testing.assert_array_equal(found.vectors(some), values[some])
    queries = rng.normal(size=(4, 12)).astype(np.float32)
    similarities, rows = nearest(found, torch.from_numpy(queries), 7, device=CPU)
    for query, cosines, numbers in zip(queries, similarities.tolist(), rows.tolist(), strict=True):
        expected = naive(values, query.astype(np.float64), 7)
        assert numbers == [row for _, row in expected]
        np.testing.assert_allclose(cosines, [cosine for cosine, _ in expected], atol=1e-5)
    all_rows = nearest(found, torch.from_numpy(queries[:1]), 500, device=CPU)[1]
    assert sorted(all_rows.flatten().tolist()) == list(range(200))


@pytest.mark.parametrize("name", ["x.parquet", "x", "x.npy"])
def test_what_is_known_of_a_row_comes_back(name: str, tmp_path: Path) -> None:
    found = written(tmp_path / name, [np.ones((20, 2), np.float32), np.ones((5, 2), np.float32)], group_bytes=40)
    asked = [22, 1, 0, 21, 19]
    every = list(found.all_rows())
    assert (len(every), [every[row] for row in asked]) == (25, found.rows(asked))
    assert found.rows(asked) == [
        Row(
            row=number,
            index=10 * number,
            key=f"{100 * number:012d}",
            source=None if number % 2 else f'a "quoted", name {number}',
            label=None if number % 3 == 0 else number % 3 - 1,
            class_name=[None, "cat", "dog"][number % 3],
        )
        for number in asked
    ]


@given(data=st.data(), k=st.integers(1, 9))
def test_of_equal_neighbors_the_first_one_comes_first_however_the_index_is_cut(data: st.DataObject, k: int) -> None:
    # Few directions, so that many are equal, and exactly so in float32.
    directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=24))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(chosen)), max_size=3)))
    chunks = [chunk for chunk in np.split(directions[chosen], cuts) if len(chunk)]
    query = directions[data.draw(st.integers(0, 3))]
    similarities, rows = nearest(InMemory(chunks), torch.from_numpy(query[None]), k, device=CPU)
    expected = naive(directions[chosen], query, k)
    assert list(zip(similarities[0].tolist(), rows[0].tolist(), strict=True)) == expected


@pytest.fixture(scope="module")
def embedded(finished_run: Path, packed_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "x.parquet"
    assert main(["embed", str(finished_run), str(packed_demo.val), "--out", str(out), "--device", "cpu"]) == 0
    return out


def images_of(packed_demo: Any) -> list[Path]:
    lines = (packed_demo.val / "shard-000000.sources.txt").read_text().splitlines()
    return [Path(lines[5]), Path(lines[40])]


def test_an_image_of_the_index_finds_itself_and_what_the_api_finds(
    embedded: Path, finished_run: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, page = images_of(packed_demo), tmp_path / "page.html"
    words = ["search", str(embedded), *map(str, queries), "--device", "cpu", "-k", "4", "--html", str(page)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [answer["query"] for answer in found] == [str(path) for path in queries]
    expected = moco_fast.embed(moco_fast.load_encoder(finished_run), packed_demo.val, device="cpu")
    for answer, row in zip(found, (5, 40), strict=True):
        hits = answer["hits"]
        assert (hits[0]["row"], hits[0]["source"], round(hits[0]["similarity"], 3)) == (row, answer["query"], 1.0)
        near = expected.nearest(row, 3)
        assert [hit["row"] for hit in hits[1:]] == [number for number, _ in near]
        np.testing.assert_allclose([hit["similarity"] for hit in hits[1:]], [each for _, each in near], atol=1e-3)
    html = page.read_text()
    assert html.count('<img src="data:image/') == 2 + 8
    assert "http" not in html.replace("http-equiv", "")
    assert "Not all pictures" not in html
    assert main(words[:-2]) == 0
    table = capsys.readouterr().out.splitlines()
    assert (table[0], len(table)) == (str(queries[0]), 11)
    assert table[1].split()[:2] == ["1.0000", str(queries[0])]


def test_pictures_of_a_folder_are_shown_as_far_as_they_are_there(
    finished_run: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(packed_demo.val.parent / "images" / "val" / "coffee", folder)
    names = sorted(folder.iterdir())
    out, page = tmp_path / "x.npy", tmp_path / "page.html"
    assert main(["embed", str(finished_run), str(folder), "--out", str(out), "--device", "cpu"]) == 0
    words = ["search", str(out), str(names[0]), "--html", str(page), "--device", "cpu"]
    assert main(words) == 0
    assert page.read_text().count('<img src="data:image/') == 1 + 4
    names[-1].unlink()
    assert main(words) == 0
    assert page.read_text().count('<img src="data:image/') == 1 + 3
    assert "1 image is not a file in its place" in page.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{there}/nothing.parquet {image}", "does not exist: give the file or folder that was its --out"),
        ("{image} {image}", "is not something that `moco-fast embed` wrote"),
        ("{index} {there}/nothing.png", "there is no image"),
        ("{index} {there}/broken.png", "broken.png: not an image"),
        ("{index} {image} --k 0", "--k is 0"),
        ("{index} {image} --html {there}/no/page.html", "there is no such folder to write to"),
        ("{index} {image} --encoder {there}/nothing", "nothing does not exist"),
        ("{index} {image} --encoder {other}", "was written with another encoder"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    words: str,
    says: str,
    embedded: Path,
    packed_demo: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    other = tmp_path / "other.pth"
    if "{other}" in words:
        import torchvision

        torch.save(torchvision.models.resnet18().state_dict(), other)
    image = images_of(packed_demo)[0]
    given = words.format(there=tmp_path, image=image, index=embedded, other=other)
    assert main(["search", *given.split(), "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_files_that_are_missing_or_cut_off_are_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "x", [np.ones((20, 2), np.float32), np.ones((5, 2), np.float32)])
    (folder.path / "part-000001.parquet").unlink()
    with pytest.raises(ValueError, match="has 20 rows, not 25: files are missing"):
        open_index(folder.path)
    array = written(tmp_path / "x.npy", [np.ones((20, 2), np.float32)])
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="is cut off"):
        list(array.chunks())
