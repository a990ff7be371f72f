"""Exploring: majorities against a naive count, and the command from vectors to lists and a page."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moco_fast.cli import main
from moco_fast.embedding import explore
from moco_fast.embedding.index import open_index
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from tests.moco_fast.embedding.written import CPU, written


@given(data=st.data(), num_rows=st.integers(1, 12), k=st.integers(1, 7), chunk=st.integers(1, 5))
def test_majorities_are_those_of_a_count(data: st.DataObject, num_rows: int, k: int, chunk: int) -> None:
    labels = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=num_rows, max_size=num_rows)))
    row = st.integers(0, num_rows - 1)
    near = [data.draw(st.lists(row, min_size=k, max_size=k)) for _ in range(num_rows)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explore, "_CHUNK", chunk)
        majority, share = explore._majorities(labels, np.array(near))
    for place, rows in enumerate(near):
        label, count = Counter(labels[rows].tolist()).most_common(1)[0]
        has_one = count > k / 2 and label >= 0
        assert majority[place] == (label if has_one else -1)
        assert share[place] == pytest.approx(count / k if has_one else 0)


def test_what_stands_out_comes_first(tmp_path: Path) -> None:
    # Five cats and five dogs, one cat among the dogs; rows 3 and 8 are copies; row 11 is like nothing else.
    angles = np.radians([0, 1, 2, 3, 4, 90, 91, 92, 3, 93, 94, 225])
    values = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    index = written(tmp_path / "x.npy", [values])
    found = explore.explore(index, k=3, threshold=0.999999, device=CPU)
    assert found.duplicates.tolist() == [3, 8]
    assert (found.groups.tolist(), found.dropped.tolist()) == ([3], [8])
    assert found.outliers[0] == 11
    # `written` gives every row a label, number % 3 - 1.
    labels = np.arange(12) % 3 - 1
    np.testing.assert_array_equal(found.labels, labels)
    near = labels[found.neighbors.rows.numpy()]
    expected = [
        row
        for row in range(12)
        if labels[row] >= 0 and any((near[row] == other).sum() > 1 for other in {0, 1} - {labels[row]})
    ]
    assert sorted(found.suspicious.tolist()) == expected
    assert np.all(np.diff(found.share[found.suspicious]) <= 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of noise in two classes: two copies of one image, under the other's class, and one image all white."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        (folder / name).mkdir()
        for number in range(6):
            dark = rng.integers(0, 60, (20, 20, 3)) + 150 * (1 - label)
            Image.fromarray(dark.astype(np.uint8)).save(folder / name / f"{number}.png")
    (folder / "night" / "copy.png").write_bytes((folder / "day" / "3.png").read_bytes())
    Image.fromarray(np.full((20, 20, 3), 255, np.uint8)).save(folder / "day" / "white.png")
    return folder


@pytest.fixture(scope="module")
def embedded(photos: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "x.npy"
    words = ["embed", str(finished_run), str(photos), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    return out


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_lists_lead_to_a_set_without_near_duplicates(
    suffix: str, embedded: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "explored"
    words = ["explore", str(embedded), "--out", str(out), "--device", "cpu", "--threshold", "0.99999", "-k", "3"]
    assert main([*words, "--format", suffix, "--outliers", "5"]) == 0
    said = capsys.readouterr().out
    assert "near-duplicates: 2 images in 1 groups; 1 of 14 could be dropped" in said
    rows = {row.row: row for row in open_index(embedded).all_rows()}
    first, second = read(out / f"duplicates.{suffix}")
    assert [Path(each["source"]).name for each in (first, second)] == ["3.png", "copy.png"]
    assert first["representative"] == second["representative"] == first["key"] != second["key"]
    assert [int(each["group"]) for each in (first, second)] == [1, 1]
    assert float(second["similarity"]) == pytest.approx(1, abs=1e-5)
    outliers = read(out / f"outliers.{suffix}")
    assert len(outliers) == 5
    assert [float(each["similarity"]) for each in outliers] == sorted(float(each["similarity"]) for each in outliers)
    assert "copy.png" in {Path(each["source"]).name for each in read(out / f"labels.{suffix}")}
    kept = read(out / "keep.csv")
    assert len(kept) == len(rows) - 1
    assert {Path(each["path"]).parent.name for each in kept} == {each["label"] for each in kept} == {"day", "night"}
    pack(PackConfig(sources=(str(out / "keep.csv"),), out=str(tmp_path / "again"), workers=1))
    again = open_set(tmp_path / "again")
    assert (again.num_samples, again.class_names) == (13, ("day", "night"))


def test_without_labels_the_list_of_what_to_keep_has_paths_alone(
    photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    vectors, out = tmp_path / "x.parquet", tmp_path / "explored"
    assert main(["embed", str(finished_run), str(photos / "day"), "--out", str(vectors), "--device", "cpu"]) == 0
    assert main(["explore", str(vectors), "--out", str(out), "--device", "cpu", "--threshold", "0.99999"]) == 0
    kept = read(out / "keep.csv")
    assert sorted(each["path"] for each in kept) == sorted(str(path) for path in (photos / "day").iterdir())
    assert all(list(each) == ["path"] for each in kept)
    assert not (out / "labels.csv").exists()


def test_the_page_shows_each_of_them_and_needs_nothing_else(embedded: Path, tmp_path: Path) -> None:
    out = tmp_path / "explored"
    words = ["explore", str(embedded), "--out", str(out), "--device", "cpu", "--threshold", "0.99999", "-k", "3"]
    assert main([*words, "--show", "4"]) == 0
    page = (out / "explore.html").read_text()
    suspicious = page.count('class="asked"')
    assert 1 <= suspicious <= 4
    assert page.count('<img src="data:image/') == 2 + 4 + suspicious * (1 + 3)
    assert page.count("<b>stays</b>") == 1
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Not all pictures" not in page
    assert "make-shards pack keep.csv" in page
    assert "<script" not in page


def test_of_a_run_the_training_images_are_embedded_first(
    finished_run: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "explored"
    words = ["explore", str(finished_run), "--out", str(out), "--device", "cpu", "--threshold", "0.1", "--show", "2"]
    assert main(words) == 0
    assert len(open_index(out / "vectors.npy").rows(range(288))) == 288
    assert "more than half of all images count as near-duplicates: raise --threshold" in capsys.readouterr().out
    assert "More than half of all images" in (out / "explore.html").read_text()
    assert main([*words, "--format", "jsonl"]) == 0
    assert "were there already" in capsys.readouterr().out
    assert not (out / "labels.csv").exists(), "a list of before is left"


def test_without_files_there_is_no_list_to_pack_and_it_is_said(tmp_path: Path, capsys: Any) -> None:
    index = written(tmp_path / "x.parquet", [np.eye(4, dtype=np.float32)])
    assert main(["explore", str(index.path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert not (tmp_path / "out" / "keep.csv").exists()
    assert "There is no list of what to keep" in (tmp_path / "out" / "explore.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{there}/nothing.npy --out {there}/x", "does not exist"),
        ("{index} --out {there}/no/x", "there is no such folder to write to"),
        ("{index} --out {index}", "is a file: give the name of a folder"),
        ("{index} --out {there}/x --threshold 0", "--threshold is 0.0"),
        ("{index} --out {there}/x -k 0", "--k is 0"),
        ("{one} --out {there}/x", "it takes two to have neighbors"),
    ],
)
def test_what_cannot_be_explored_is_refused(
    words: str, says: str, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = written(tmp_path / "one.npy", [np.ones((1, 2), np.float32)]).path
    assert main(["explore", *words.format(there=tmp_path, index=embedded, one=one).split(), "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
