"""Benchmarks packed into shards give what their folders give, to the last bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_fast.cli import main
from moco_fast.transfer.coco import drawn_masks, encoded_masks
from moco_fast.transfer.layouts import measured, read_sets
from moco_fast.transfer.loader import HeldOutImages, TrainingImages
from moco_fast.transfer.metrics import Detections
from moco_fast.transfer.pixel_sets import read_pixel_sets, read_pixels
from moco_fast.transfer.presets import PRESETS, SEGMENT_PRESETS
from pipelines.world import World
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.benchmark import open_benchmark
from tests.moco_fast.transfer.coco_shapes import write_coco
from tests.moco_fast.transfer.lvis_shapes import write_lvis
from tests.moco_fast.transfer.pixel_shapes import write_city_instances, write_cityscapes, write_voc_pixels
from tests.moco_fast.transfer.shapes import annotation, write_year
from tests.moco_fast.transfer.test_command import transfer
from tests.moco_fast.transfer.tiny import TINY

WORLD = World(rank=0, world_size=1, local_world_size=1)


def packed(folder: Path, out: str | Path, **options) -> str:
    config = PackConfig(
        sources=(str(folder),), out=str(out), annotations=True, workers=1, **{"shard_samples": 3, **options}
    )
    assert pack(config) is not None
    return str(out)


def odd_images(year: Path) -> None:
    """Put among a year's images what is turned, gray, CMYK, progressive, a PNG, cut off, not an image, not there."""
    place = year / "JPEGImages"
    names = [path.stem for path in sorted(place.glob("*.jpg"))]
    pictures = {name: Image.open(place / f"{name}.jpg").convert("RGB") for name in names}
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[names[0]].save(place / f"{names[0]}.jpg", exif=exif, quality=95)
    width, height = pictures[names[0]].size
    told = (year / "Annotations" / f"{names[0]}.xml").read_text()
    told = told.replace(f"<width>{width}</width><height>{height}", f"<width>{height}</width><height>{width}")
    (year / "Annotations" / f"{names[0]}.xml").write_text(told)
    pictures[names[1]].convert("L").save(place / f"{names[1]}.jpg")
    pictures[names[2]].convert("CMYK").save(place / f"{names[2]}.jpg")
    pictures[names[3]].save(place / f"{names[3]}.jpg", progressive=True)
    pictures[names[4]].save(place / f"{names[4]}.jpg", format="PNG")
    whole = (place / f"{names[5]}.jpg").read_bytes()
    (place / f"{names[5]}.jpg").write_bytes(whole[: len(whole) // 2])
    (place / f"{names[6]}.jpg").write_bytes(b"")
    (place / f"{names[7]}.jpg").unlink()
    (year / "Annotations" / f"{names[8]}.xml").write_text(annotation(5, 5, []))


def batches_of(data, preset, *, steps: int = 6):
    with TrainingImages(data.with_boxes, preset, seed=2, world=WORLD, threads=2, at_most_damaged=0.5) as images:
        stream = images.batches(0)
        found = [next(stream) for _ in range(steps)]
        return found, images.damaged


def assert_same_images(of_folder, of_shards, preset) -> None:
    small = replace(preset, batch_size=2, group=1)
    (first, damaged), (second, also_damaged) = (batches_of(data, small) for data in (of_folder, of_shards))
    assert list(damaged) == list(also_damaged)
    for one, other in zip(first, second, strict=True):
        for image, same in zip(one.images, other.images, strict=True):
            assert torch.equal(image, same)
        for target, same in zip(one.targets, other.targets, strict=True):
            assert target.keys() == same.keys()
            assert all(torch.equal(target[name], same[name]) for name in target)
    tested = [HeldOutImages(data, preset, world=WORLD, threads=2) for data in (of_folder, of_shards)]
    for one, other in zip(*tested, strict=True):
        assert (one.image is None) == (other.image is None)
        assert one.image is None or torch.equal(one.image, other.image)


def write_odd_year(folder: Path) -> None:
    write_year(folder / "VOC2007", {"trainval": 14, "test": 3})
    odd_images(folder / "VOC2007")


def as_found(data) -> Detections:
    """All that is marked, as if it had been found."""
    parts = [(np.full(len(each.boxes), number), each.boxes, each.classes) for number, each in enumerate(data.images)]
    image, boxes, classes = map(np.concatenate, zip(*parts, strict=True))
    drawn = [drawn_masks(each, height=each.height, width=each.width, is_mirrored=False) for each in data.images]
    masks = [mask for of_image in drawn for mask in encoded_masks(of_image)]
    return Detections(
        image=image, boxes=boxes, classes=classes, scores=np.linspace(1, 0.5, len(image), dtype=np.float32), masks=masks
    )


def tiny(preset: str, **more):
    return replace(PRESETS[preset], **{"sides": (48, 56), "test_side": 64, "longest": 96, **more})


LAYOUTS = {
    "voc": (write_odd_year, TINY, 3),
    "coco": (lambda folder: write_coco(folder, {"train2017": 9, "val2017": 3}), tiny("coco-fpn-1x"), 0),
    "lvis": (lambda folder: write_lvis(folder, {"train": 7, "val": 3}), tiny("lvis-fpn-2x"), 0),
    "cityscapes": (lambda at: write_city_instances(at, {"train": 5, "val": 3}), tiny("cityscapes-instance"), 0),
}
"""What writes a benchmark, what reads it, and how many images of its training set cannot be used."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_images_and_figures_from_shards_are_those_of_the_folder(layout, tmp_path) -> None:
    write, preset, num_malformed = LAYOUTS[layout]
    write(tmp_path / "data")
    out = packed(tmp_path / "data", tmp_path / "out")
    sets = [read_sets([where], preset, class_names=None) for where in (str(tmp_path / "data"), out)]
    for of_folder, of_shards in zip(*sets, strict=True):
        assert of_shards.identity == of_folder.identity
        assert [each.key for each in of_shards.images] == [each.key for each in of_folder.images]
        assert {each.key for each in of_shards.malformed} == {each.key for each in of_folder.malformed}
        assert_same_images(of_folder, of_shards, preset)
    assert len(sets[1][0].malformed) == num_malformed
    if preset.masks:
        figures = [measured(as_found(test), test) for _, test in sets]
        assert figures[0] == figures[1]
        assert all(each.mean > 0 for of_kind in figures[0].values() for each in of_kind)


@pytest.mark.parametrize("layout", ["voc", "cityscapes"])
def test_classes_of_pixels_from_shards_are_those_of_the_folder(layout, tmp_path) -> None:
    preset = SEGMENT_PRESETS[f"{layout}-semantic"]
    if layout == "voc":
        write_voc_pixels(tmp_path / "data" / "VOC2012", {"train_aug": 5, "val": 2})
        (tmp_path / "data" / "VOC2012" / "SegmentationClass" / "train_aug_002.png").unlink()
    else:
        write_cityscapes(tmp_path / "data", {"train": 5, "val": 2})
    out = packed(tmp_path / "data", tmp_path / "out")
    sets = [read_pixel_sets([where], preset) for where in (str(tmp_path / "data"), out)]
    for of_folder, of_shards in zip(*sets, strict=True):
        assert of_shards.identity == of_folder.identity
        assert of_shards.malformed == of_folder.malformed
        for one, other in zip(of_folder.images, of_shards.images, strict=True):
            assert one.key == other.key
            for mine, same in zip(read_pixels(one, of_folder.table), read_pixels(other, of_shards.table), strict=True):
                assert np.array_equal(np.asarray(mine), np.asarray(same))
    assert len(sets[1][0].malformed) == (layout == "voc")


def test_a_training_from_shards_finds_the_same_figures(tmp_path) -> None:
    write_year(tmp_path / "VOCdevkit" / "VOC2007", {"trainval": 6, "test": 2})
    out = packed(tmp_path / "VOCdevkit", tmp_path / "packed")
    places = {"folder": tmp_path / "VOCdevkit", "shards": Path(out)}
    for name, where in places.items():
        assert transfer(where, tmp_path / name) == 0
    told = [json.loads((tmp_path / name / "results.json").read_text())["results"][0] for name in places]
    for key in ("figures", "curves", "seeds"):
        assert told[0][key] == told[1][key]
    assert [each["digest"] for each in told[0]["data"].values()] == [
        each["digest"] for each in told[1]["data"].values()
    ]
    weights = [next((tmp_path / name / "trained").iterdir()) for name in places]
    assert weights[0].name == weights[1].name
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # So a training that was begun from one goes on from the other.
    assert transfer(places["shards"], tmp_path / "folder") == 0


def test_years_that_were_packed_apart_are_read_together(tmp_path) -> None:
    for year in ("VOC2007", "VOC2012"):
        write_year(tmp_path / "data" / year, {"trainval": 4, "test": 2})
    preset = replace(TINY, train=("VOC2007/trainval", "VOC2012/trainval"))
    apart = [packed(tmp_path / "data" / year, tmp_path / year) for year in ("VOC2007", "VOC2012")]
    together = packed(tmp_path / "data", tmp_path / "both")
    of_folder = read_sets([str(tmp_path / "data")], preset, class_names=None)
    with pytest.raises(ValueError, match="are given with spaces between them, not with commas"):
        open_benchmark(",".join(apart))
    for where in (apart, [together]):
        of_shards = read_sets(where, preset, class_names=None)
        assert [each.identity for each in of_shards] == [each.identity for each in of_folder]


def test_a_benchmark_in_a_bucket_is_read_by_ranges(tmp_path, bucket) -> None:
    write_year(tmp_path / "data" / "VOC2007", {"trainval": 5, "test": 2})
    address = packed(tmp_path / "data", f"{bucket}/voc", work_folder=str(tmp_path))
    sets = [read_sets([where], TINY, class_names=None) for where in (str(tmp_path / "data"), address)]
    for of_folder, of_shards in zip(*sets, strict=True):
        assert of_shards.identity == of_folder.identity
        assert of_shards.where.startswith("s3://")
        assert_same_images(of_folder, of_shards, TINY)


def flip(set_folder: str, inner: str) -> None:
    """Change a byte in the middle of a packed file."""
    file = open_benchmark(set_folder).files.files[inner]
    path = Path(set_folder) / "files" / inner
    if file.shard >= 0:
        path = Path(open_set(set_folder).shard_name(file.shard))
    data = bytearray(path.read_bytes())
    data[file.offset + file.size // 2] ^= 0x10
    path.write_bytes(data)


def test_a_changed_image_is_replaced_and_a_changed_annotation_is_an_error(tmp_path, capsys) -> None:
    write_year(tmp_path / "data" / "VOC2007", {"trainval": 10, "test": 2})
    out = packed(tmp_path / "data", tmp_path / "out")
    train, _ = read_sets([out], TINY, class_names=None)
    key = train.images[3].key
    flip(out, f"VOC2007/JPEGImages/{key.partition('/')[2]}.jpg")
    _, damaged = batches_of(train, TINY)
    assert list(damaged) == [key]
    assert "has changed since it was packed: restore it" in capsys.readouterr().err
    flip(out, "VOC2007/Annotations/trainval_0004.xml")
    with pytest.raises(PackError, match=r"VOC2007/Annotations/trainval_0004\.xml has changed since it was packed"):
        read_sets([out], TINY, class_names=None)
    flip(out, "VOC2007/Annotations/trainval_0004.xml")
    flip(out, "VOC2007/ImageSets/Main/trainval.txt")
    with pytest.raises(PackError, match=r"files/VOC2007/ImageSets/Main/trainval\.txt has changed"):
        read_sets([out], TINY, class_names=None)


def test_shards_without_annotations_are_refused_with_a_way_out(tmp_path, capsys) -> None:
    write_year(tmp_path / "data" / "VOC2007", {"trainval": 4, "test": 2})
    pack(PackConfig(sources=(str(tmp_path / "data" / "VOC2007" / "JPEGImages"),), out=str(tmp_path / "out"), workers=1))
    assert transfer(tmp_path / "out", tmp_path / "results") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a set of shards without annotations" in said
    assert "make-shards pack FOLDER --annotations" in said
    assert main(["transfer", "presets"]) == 0
    preset = PRESETS["voc-c4"]
    out = packed(tmp_path / "data", tmp_path / "annotated")
    with pytest.raises(ValueError, match=r"there is no VOC2012/ImageSets/Main/trainval\.txt in"):
        read_sets([out], preset, class_names=None)


def test_a_packed_path_finds_what_pathlib_finds(tmp_path) -> None:
    write_cityscapes(tmp_path / "data", {"train": 2, "val": 1})
    root, path = tmp_path / "data", open_benchmark(packed(tmp_path / "data", tmp_path / "out"))
    for pattern in ("*", "*/*", "leftImg8bit/train/*", "*/val/*/*_000019_*", "gtFine/*/town/*labelIds.png", "none/*"):
        found = sorted(each.inner for each in path.glob(pattern))
        assert found == sorted(each.relative_to(root).as_posix() for each in root.glob(pattern))
    inner = path / "leftImg8bit" / "val"
    assert (inner.name, inner.parent.name, inner.is_dir(), inner.is_file()) == ("val", "leftImg8bit", True, False)
    assert (inner / "town" / "x.png").stem == "x"
    assert not (inner / "town" / "x.png").exists()
    assert (inner / "../train" / "town").is_dir()
    assert inner / "." / "../.." == path
    with pytest.raises(FileNotFoundError):
        (inner / "town" / "x.png").read_bytes()


def test_files_of_lvis_may_lie_beside_shards_of_coco(tmp_path) -> None:
    write_lvis(tmp_path / "coco", {"train": 4, "val": 2})
    (tmp_path / "lvis").mkdir()
    wanted = [each.identity for each in read_sets([str(tmp_path / "coco")], tiny("lvis-fpn-2x"), class_names=None)]
    for path in (tmp_path / "coco").glob("lvis_*.json"):
        path.rename(tmp_path / "lvis" / path.name)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("{}")
    out = packed(tmp_path / "coco", tmp_path / "out")
    of_shards = read_sets([out, str(tmp_path / "lvis")], tiny("lvis-fpn-2x"), class_names=None)
    assert [each.identity for each in of_shards] == wanted
