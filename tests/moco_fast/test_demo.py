import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_fast import demo
from moco_fast.demo import PHOTOGRAPHS, DemoConfig, cut_positions, write_images


def small(out: Path, **changes: int) -> DemoConfig:
    return DemoConfig(**({"out": str(out), "num_train": 6, "num_held_out": 2} | changes))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in files)
    ).hexdigest()


@pytest.mark.parametrize("size", [16, 32, 48, 64])
@pytest.mark.parametrize(("width", "height"), [(512, 512), (451, 300), (448, 172), (1411, 1411)])
def test_no_held_out_pixel_is_learned_from(width: int, height: int, size: int) -> None:
    train, held_out = cut_positions(width, height, size)
    learned = np.zeros((height, width), dtype=bool)
    for left, top in train:
        learned[top : top + size, left : left + size] = True
    assert train
    assert held_out
    for left, top in held_out:
        assert 0 <= left <= width - size
        assert 0 <= top <= height - size
        # The margin: not even the neighborhood of a held-out patch is seen.
        near = learned[max(top - 4, 0) : top + size + 4, max(left - 4, 0) : left + size + 4]
        assert not near.any()


def test_writes_every_photograph_in_both_splits(tmp_path: Path) -> None:
    assert write_images(small(tmp_path / "images"))
    for split, number in (("train", 6), ("val", 2)):
        folder = tmp_path / "images" / split
        assert sorted(path.name for path in folder.iterdir()) == sorted(PHOTOGRAPHS)
        assert {len(list(path.glob("*.jpg"))) for path in folder.iterdir()} == {number}
    with Image.open(tmp_path / "images" / "train" / "cat" / "0003.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_patches_are_the_photograph_s_pixels(tmp_path: Path) -> None:
    write_images(small(tmp_path / "images"))
    with Image.open(demo.photograph_path(PHOTOGRAPHS["coffee"])) as photograph:
        pixels = np.asarray(photograph, dtype=int)
    left, top = cut_positions(pixels.shape[1], pixels.shape[0], 64)[1][-1]
    with Image.open(tmp_path / "images" / "val" / "coffee" / "0001.jpg") as image:
        difference = np.abs(np.asarray(image, dtype=int) - pixels[top : top + 64, left : left + 64])
    assert difference.mean() < 3


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    write_images(small(tmp_path / "a"))
    write_images(small(tmp_path / "b"))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_second_call_leaves_the_images_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    write_images(small(tmp_path / "images"))
    before = digest(tmp_path / "images")
    assert not write_images(small(tmp_path / "images"))
    with pytest.raises(ValueError, match="holds something else"):
        write_images(small(tmp_path / "images", size=48))
    assert digest(tmp_path / "images") == before


def test_a_foreign_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write_images(small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_many_images_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"100000 images of 64 pixels for train.*choose another number"):
        write_images(small(tmp_path / "images", num_train=100_000))
    assert not list(tmp_path.iterdir())


def test_without_scikit_image_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main([str(tmp_path / "images")]) == 2
    assert "pip install scikit-image" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "images"
    command = [sys.executable, "-m", "moco_fast.demo", str(out), "--num-train", "3", "--num-held-out", "1"]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "54 training and 18 held-out images of 64 x 64 pixels, 18 classes" in first.stdout
    assert "(already there)" in again.stdout
    assert json.loads((out / "demo.json").read_text())["num_train"] == 3
