"""Folders of class folders as sets: packed once, found again, evicted, refused."""

import gc
import io
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moco_fast
from moco_fast import distributed
from moco_fast.cli import main
from moco_fast.evaluation import packed
from moco_fast.evaluation.packed import open_data
from moco_fast.evaluation.room import SETS_FOLDER, make_room
from shards.images.libraries import decode_jpeg
from tests.shards.pictures import encoded, fill, jpeg, picture
from tests.warm import WarmPython


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "data" / "train", 12, classes=3)


def sets_in(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / SETS_FOLDER).iterdir() if not path.name.startswith("."))


def samples(shards: Any) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for shard in range(shards.num_shards):
        for record in shards.index(shard):
            data = np.empty(int(record["size"]), dtype=np.uint8)
            shards.open_shard(shard).read_into(data, int(record["offset"]))
            decode_jpeg(data.tobytes())
            found.add((shards.class_names[record["label"]], int(record["crc32c"])))
    return found


def test_class_folders_are_packed_once_and_found_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_data(str(folder), cache=tmp_path / "cache")
    assert first.class_names == ("class0", "class1", "class2")
    assert (first.num_samples, len(samples(first))) == (12, 12)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: 12 images in 3 classes are packed into {tmp_path / 'cache' / 'sets'}")
    again = open_data(str(folder), cache=tmp_path / "cache")
    assert again.where == first.where
    assert capsys.readouterr().err == ""
    assert len(sets_in(tmp_path / "cache")) == 1


@pytest.mark.parametrize("change", ["another file", "other bytes", "a later time", "one less"])
def test_another_content_is_another_set(folder: Path, tmp_path: Path, change: str) -> None:
    first = open_data(str(folder), cache=tmp_path)
    path = folder / "class0" / "0000.jpg"
    status = path.stat()
    match change:
        case "another file":
            (folder / "class1" / "new.jpg").write_bytes(jpeg(99))
        case "other bytes":
            path.write_bytes(jpeg(99))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "a later time":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        case _:
            path.unlink()
    assert open_data(str(folder), cache=tmp_path).where != first.where


def test_a_class_is_the_first_folder_and_links_are_followed(folder: Path, tmp_path: Path) -> None:
    # As in tiny-imagenet-200: train/n01443537/images/n01443537_0.JPEG, with boxes beside.
    deep = tmp_path / "deep"
    for label in ("n01", "n02"):
        fill(deep / label / "images", 30)
    (deep / "n03").symlink_to(folder / "class0")
    (deep / "n02" / "images" / "loop").symlink_to(deep / "n02")
    (deep / "n02" / "boxes.txt").write_text("0 0 62 62\n")
    (deep / ".hidden").mkdir()
    (deep / "n01" / "._0001.jpg").write_bytes(b"left behind")
    found = open_data(str(deep), cache=tmp_path)
    assert found.class_names == ("n01", "n02", "n03")
    assert found.num_samples == 64
    assert found.manifest.rejections == {"not an image": 1}


def test_what_is_not_a_folder_of_class_folders_is_refused(tmp_path: Path) -> None:
    flat = fill(tmp_path / "flat", 3)
    with pytest.raises(ValueError, match="holds 3 files, but no folders with images: a data set is shards, or"):
        open_data(str(flat), cache=tmp_path)
    empty = tmp_path / "empty"
    (empty / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        open_data(str(empty), cache=tmp_path)
    both = tmp_path / "both"
    fill(both / "train", 2, classes=2)
    fill(both / "val", 2, classes=2)
    with pytest.raises(ValueError, match=r"parts of a data set in place of classes: give .*/train or .*/val"):
        open_data(str(both), cache=tmp_path)
    texts = tmp_path / "texts"
    for label in ("cat", "dog"):
        (texts / label).mkdir(parents=True)
        (texts / label / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"2 of 2 files cannot be read as images \(not an image 2\)"):
        open_data(str(texts), cache=tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        open_data(str(tmp_path / "nowhere"), cache=tmp_path)
    assert sets_in(tmp_path) == []
    assert [path.suffix for path in (tmp_path / SETS_FOLDER).iterdir() if path.is_dir()] == []


def test_shards_are_opened_as_they_are_and_unfinished_ones_explained(folder: Path, tmp_path: Path) -> None:
    (folder / ".pack").mkdir()
    with pytest.raises(ValueError, match="is not finished: run the same `make-shards pack`"):
        open_data(str(folder), cache=tmp_path)


def test_a_set_in_use_stays_and_the_oldest_other_goes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    used = open_data(str(folder), cache=cache)
    other = open_data(str(fill(tmp_path / "other", 6, classes=2)), cache=cache)
    newer = open_data(str(fill(tmp_path / "newer", 6, classes=2) / "."), cache=cache)
    for age, each in enumerate((used, other, newer)):
        os.utime(Path(each.where) / "manifest.json", (1000 + age, 1000 + age))
    unused = Path(other.where)
    size = sum(file.stat().st_size for each in (used, other, newer) for file in Path(each.where).iterdir())
    del other, each
    gc.collect()  # a set's cache of indexes refers to the set
    make_room(cache, 1000, limit_gib=size / 2**30)
    assert not unused.exists()
    assert len(samples(used)) == 12
    assert Path(newer.where).exists()
    again = open_data(str(tmp_path / "other"), cache=cache)
    assert len(samples(again)) == 6


def pack_and_die(folder: str, cache: str) -> None:
    plain = packed.pack

    def die_when_packed(*arguments: Any) -> Any:
        plain(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    packed.pack = die_when_packed
    packed.open_data(folder, cache=Path(cache))


@pytest.mark.faults
def test_a_kill_while_packing_leaves_no_set(folder: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    cache = tmp_path / "cache"
    program = f"from tests.moco_fast.test_packed import pack_and_die; pack_and_die({str(folder)!r}, {str(cache)!r})"
    killed = warm_python.run("-c", program)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sets_in(cache) == []
    assert list((cache / SETS_FOLDER).glob(".*.partial"))
    make_room(cache, 0, limit_gib=1)
    assert not list((cache / SETS_FOLDER).glob(".*.partial"))
    assert open_data(str(folder), cache=cache).num_samples == 12


def open_on_this_rank(folder: str, cache: str) -> tuple[int, str, int]:
    said = io.StringIO()
    with redirect_stderr(said):
        found = open_data(folder, cache=Path(cache))
    distributed.tell_all(None)
    return found.num_samples, found.where, said.getvalue().count("are packed into")


def test_one_rank_packs_and_the_others_find_it(run_ranks: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(open_on_this_rank, str(folder), str(tmp_path / "cache"))
    assert first[:2] == second[:2]
    assert first[2] + second[2] == 1


def shaded(folder: Path, count: int, seed: int) -> None:
    """Two classes that any encoder tells apart: dark and bright pictures."""
    for label, factor in (("bright", 1.0), ("dark", 0.25)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            image = picture(seed + i, 32, 32).point(lambda value, factor=factor: int(value * factor))
            (folder / label / f"{i}.png").write_bytes(encoded(image, "PNG"))


def test_eval_takes_class_folders(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shaded(data / "train", 12, seed=0)
    shaded(data / "val", 6, seed=100)
    words = ["eval", "suite", "--encoder", str(finished_run), "--tasks", "knn", "--device", "cpu", "--out", "-"]
    assert main([*words, "--data", str(data)]) == 0
    assert capsys.readouterr().err.count("are packed into") == 2
    result = moco_fast.evaluate(
        "knn", finished_run, train=str(data / "train"), test=str(data / "val"), settings={"k": (5,)}
    )
    assert result.headline.value > 0.8
    assert result.data["test"]["num_samples"] == 12
    assert "packed" not in capsys.readouterr().err
    assert main([*words, "--data", str(data / "train")]) == 2
    assert "has no set in a folder `train`, neither shards nor class folders" in capsys.readouterr().err
