from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_fast.transfer.layouts import read_sets, refuse_unmarked
from moco_fast.transfer.loader import augmented
from moco_fast.transfer.presets import PRESETS
from moco_fast.transfer.sets import as_shown, refuse_malformed
from moco_fast.transfer.voc import VOC_CLASSES, find_parts, read_voc
from tests.moco_fast.transfer.shapes import annotation, write_year


@pytest.fixture
def year(tmp_path: Path) -> Path:
    return write_year(tmp_path / "VOC2007", {"trainval": 3, "test": 1})


def read(year: Path, part: str = "trainval", names=None):
    return read_voc(find_parts([str(year)], [f"{year.name}/{part}"], option="--train"), class_names=names)


def annotate(year: Path, key: str, *args, **options) -> None:
    (year / "Annotations" / f"{key}.xml").write_text(annotation(*args, **options))


def test_boxes_go_from_the_first_pixel_to_the_end_of_the_last(year) -> None:
    with Image.open(year / "JPEGImages" / "trainval_0000.jpg") as image:
        size = image.size
    annotate(year, "trainval_0000", *size, [("dog", (1, 1, *size)), ("cat", (11, 21, 30, 40))], difficult=1)
    first = read(year).images[0]
    assert (first.width, first.height) == size
    assert first.boxes.tolist() == [[0, 0, *size], [10, 20, 30, 40]]
    assert [VOC_CLASSES[number] for number in first.classes] == ["dog", "cat"]
    assert first.is_difficult.tolist() == [True, True]


def test_a_folder_of_years_is_searched_and_parts_follow_each_other(year) -> None:
    write_year(year.parent / "VOC2012", {"trainval": 2}, seed=1)
    parts = find_parts([str(year.parent)], ["VOC2007/trainval", "VOC2012/trainval"], option="--train")
    keys = [image.key for image in read_voc(parts, class_names=None).images]
    assert keys == [*(f"VOC2007/trainval_000{n}" for n in range(3)), *(f"VOC2012/trainval_000{n}" for n in range(2))]


def test_a_year_may_be_a_link(year, tmp_path, monkeypatch) -> None:
    stored = year.rename(tmp_path / "stored")
    (tmp_path / "VOC2012").symlink_to(stored)
    [(folder, _)] = find_parts([str(tmp_path / "VOC2012")], ["VOC2012/test"], option="--train")
    assert folder.resolve() == stored
    monkeypatch.chdir(stored)
    assert find_parts(["."], ["stored/test"], option="--train") == [(Path(), "test")]


@pytest.mark.parametrize(
    ("parts", "reason"), [(["VOC2007"], "a part of it"), (["VOC2007/val"], "no VOC2007/ImageSets/Main/val.txt")]
)
def test_a_part_that_is_not_there_is_refused(year, parts, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        find_parts([str(year)], parts, option="--train")


def test_a_part_in_two_places_is_refused(year, tmp_path) -> None:
    write_year(tmp_path / "other" / "VOC2007", {"trainval": 1})
    with pytest.raises(ValueError, match="name one of them"):
        find_parts([str(year), str(tmp_path / "other")], ["VOC2007/trainval"], option="--train")


def test_other_classes_than_those_of_voc_are_the_ones_that_are_marked(tmp_path) -> None:
    year = write_year(tmp_path / "Farm", {"train": 4}, names={"hen": (250, 0, 0), "egg": (250, 250, 250)})
    assert read(year, "train").class_names == ("egg", "hen")


BROKEN = {
    "has no .jpg of its name in JPEGImages": lambda year, key: (year / "JPEGImages" / f"{key}.jpg").unlink(),
    "is no image": lambda year, key: (year / "JPEGImages" / f"{key}.jpg").write_bytes(b"GIF87"),
    "has more than 8 bits per channel: convert it to 8": lambda year, key: Image.new("I;16", (9, 9)).save(
        year / "JPEGImages" / f"{key}.jpg", format="PNG"
    ),
    "has no annotation": lambda year, key: (year / "Annotations" / f"{key}.xml").unlink(),
    "has an annotation that is not XML": lambda year, key: (year / "Annotations" / f"{key}.xml").write_text("<a"),
    "is of another size than its annotation says": lambda year, key: annotate(year, key, 500, 375, []),
    "marks an object without a name": lambda year, key: annotate(year, key, 0, 0, [("", (1, 1, 9, 9))]),
    "has a box without four numbers": lambda year, key: annotate(year, key, 0, 0, [("cat", (1, "x", 9, 9))]),
    "has a box without an area": lambda year, key: annotate(year, key, 0, 0, [("cat", (10, 1, 9, 9))]),
    "has a box that is not within the image": lambda year, key: annotate(year, key, 0, 0, [("cat", (1, 1, 9, 999))]),
    "marks an unknown class, gnu": lambda year, key: annotate(year, key, 0, 0, [("gnu", (1, 1, 9, 9))]),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_what_cannot_be_used_is_left_out_with_a_reason_and_counted(year, reason) -> None:
    BROKEN[reason](year, "trainval_0001")
    found = read(year, names=VOC_CLASSES)
    assert [image.key for image in found.images] == ["VOC2007/trainval_0000", "VOC2007/trainval_0002"]
    assert [(each.key, each.reason) for each in found.malformed] == [("VOC2007/trainval_0001", reason)]
    [line] = refuse_malformed(found.malformed, 3, "it", at_most=0.5)
    assert line == f"it: 1 image left out, {reason}: VOC2007/trainval_0001"
    with pytest.raises(ValueError, match=r"--max-malformed 0\.1"):
        refuse_malformed(found.malformed, 3, "it", at_most=0.1)


def test_images_without_boxes_are_tested_on_but_not_trained_on(year) -> None:
    annotate(year, "trainval_0001", 0, 0, [])
    found = read(year)
    assert [len(found), len(found.with_boxes)] == [3, 2]
    assert found.with_boxes.identity != found.identity == read(year).identity
    assert np.array_equal(found.lies, [image.width > image.height for image in found.images])


def turn(path: Path, orientation: int) -> None:
    """Store an image as a camera that was turned does."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    with Image.open(path) as image:
        turned, exif = image.transpose(back), Image.Exif()
    exif[0x0112] = orientation
    turned.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_turned_as_exif_says(year, orientation) -> None:
    path = year / "JPEGImages" / "trainval_0001.jpg"
    upright = read(year).images[1]
    wanted, _ = augmented(upright, side=64, longest=96, is_mirrored=False)
    turn(path, orientation)
    found = read(year).images[1]
    pixels, target = augmented(found, side=64, longest=96, is_mirrored=False)
    assert (found.height, found.width) == (upright.height, upright.width)
    assert (pixels.float() - wanted.float()).abs().mean() < 8
    assert target["boxes"].tolist() == upright.boxes.tolist()


def test_an_annotation_of_the_image_before_it_is_turned_is_named(year) -> None:
    path = year / "JPEGImages" / "trainval_0001.jpg"
    turn(path, 6)
    with Image.open(path) as image:
        annotate(year, "trainval_0001", *image.size, [])
    [left_out] = read(year).malformed
    assert left_out.reason == "is turned by its EXIF orientation, and its annotation is not"


@pytest.mark.parametrize("side", ["inf", "-1", "nan", ""])
def test_a_size_that_cannot_be_is_one_that_is_not_known(year, side) -> None:
    annotate(year, "trainval_0001", side, side, [("cat", (1, 1, 9, 9))])
    assert (len(read(year)), read(year).malformed) == (3, [])


def test_lists_may_begin_with_a_mark_of_their_encoding(year) -> None:
    path = year / "ImageSets" / "Main" / "trainval.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert (len(read(year)), read(year).malformed) == (3, [])
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read(year)


def test_sets_without_anything_to_learn_or_to_measure_are_refused(year) -> None:
    whole, size = read(year), (0, 0)
    for number in range(3):
        annotate(year, f"trainval_000{number}", *size, [("cat", (1, 1, 9, 9))], difficult=1)
    difficult = read(year)
    refuse_unmarked(difficult, whole, PRESETS["voc-c4"])
    with pytest.raises(ValueError, match="nothing to measure"):
        refuse_unmarked(whole, difficult, PRESETS["voc-c4"])
    for number in range(3):
        annotate(year, f"trainval_000{number}", *size, [])
    with pytest.raises(ValueError, match="nothing to learn"):
        refuse_unmarked(read(year), whole, PRESETS["voc-c4"])
    assert whole.identity != difficult.identity != read(year).identity


def test_a_class_that_is_named_twice_is_refused(year) -> None:
    with pytest.raises(ValueError, match="give each once"):
        read_sets([str(year)], PRESETS["voc-c4"], class_names=("cat", "cat"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pixels_of_more_than_8_bits_are_not_cut_off_at_255(mode) -> None:
    with pytest.raises(OSError, match="more than 8 bits per channel"):
        as_shown(Image.new(mode, (3, 3)))
