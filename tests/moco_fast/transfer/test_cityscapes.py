from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_fast.transfer.cityscapes import CITYSCAPES_CLASSES, cityscapes_precision, read_cityscapes, step_precision
from moco_fast.transfer.coco import drawn_masks, encoded_masks
from moco_fast.transfer.layouts import read_sets, refuse_unmarked
from moco_fast.transfer.metrics import OVERLAPS, Detections
from moco_fast.transfer.presets import PRESETS
from tests.moco_fast.transfer.pixel_shapes import write_city_instances

NAMES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
IDS = (24, 25, 26, 27, 28, 31, 32, 33)


@pytest.fixture
def city(tmp_path: Path) -> Path:
    return write_city_instances(tmp_path / "cityscapes", {"train": 4, "val": 5})


def read(city: Path, part: str = "val"):
    return read_cityscapes([str(city)], [part], option="--test")


def instances(city: Path, number: int = 0, part: str = "val") -> Path:
    return city / "gtFine" / part / "town" / f"town_{number:06}_000019_gtFine_instanceIds.png"


def test_classes_have_the_numbers_of_the_benchmark() -> None:
    assert tuple(CITYSCAPES_CLASSES.values()) == (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    assert tuple(CITYSCAPES_CLASSES[name] for name in NAMES) == IDS


def test_objects_are_the_instances_of_the_eight_classes_without_groups(city) -> None:
    data = read(city)
    assert data.class_names == NAMES
    assert [image.key for image in data.images] == [f"val/town_{number:06}_000019" for number in range(5)]
    for number, image in enumerate(data.images):
        pixels = np.asarray(Image.open(instances(city, number))).astype(int)
        wanted = [each for each in np.unique(pixels) if each >= 1000]
        assert [IDS[label] for label in image.classes] == [each // 1000 for each in wanted]
        masks = drawn_masks(image, height=image.height, width=image.width, is_mirrored=False)
        for mask, box, each in zip(masks, image.boxes, wanted, strict=True):
            np.testing.assert_array_equal(mask, pixels == each)
            rows, columns = np.nonzero(pixels == each)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


BROKEN = {
    "has no file of instances": lambda path: path.unlink(),
    "has a file of instances that is no image": lambda path: path.write_bytes(b"no"),
    "has a file of instances in mode L": lambda path: Image.new("L", (64, 48)).save(path),
    "is of another size than its file": lambda path: Image.new("I;16", (9, 9)).save(path),
    "has pixels of an unknown class": lambda path: Image.new("I;16", (64, 48), 34_000).save(path),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_an_image_that_cannot_be_used_is_left_out_with_a_reason(city, reason) -> None:
    BROKEN[reason](instances(city, 2))
    found = read(city)
    [malformed] = found.malformed
    assert malformed.key == "val/town_000002_000019"
    assert malformed.reason.startswith(reason)
    assert len(found) == 4


def test_a_set_knows_itself_by_groups_and_void_too(city) -> None:
    before = read(city).identity
    pixels = np.array(Image.open(instances(city)))
    pixels[0, 0] = 26
    Image.fromarray(pixels).save(instances(city))
    assert read(city).identity != before


def test_sets_without_an_instance_that_counts_are_refused(city) -> None:
    preset = PRESETS["cityscapes-instance"]
    for number in range(5):
        pixels = np.full((48, 64), 7, np.uint16)
        pixels[:9, :11] = 26_000  # 99 pixels
        Image.fromarray(pixels).save(instances(city, number))
    train, test = read_sets([str(city)], preset, class_names=None)
    with pytest.raises(ValueError, match="has an object that counts, so there is nothing to measure"):
        refuse_unmarked(train, test, preset)
    with pytest.raises(ValueError, match=r"--test nowhere: there must be one leftImg8bit/nowhere"):
        read_sets([str(city)], replace(preset, test=("nowhere",)), class_names=None)


def busy(city: Path, rng: np.random.Generator) -> None:
    """Replace what is marked: instances of three classes, small ones, groups, a small group, void beside them."""
    for number in range(5):
        pixels = np.full((48, 64), rng.choice([0, 7, 29_000, 29]), np.uint16)
        for place, (top, left) in enumerate((row, column) for row in (0, 16, 32) for column in (0, 16, 32, 48)):
            label, kind = int(rng.choice([24, 26, 33])), rng.choice(["one", "group", "small", "void", "small group"])
            side = int(rng.choice([7, 10])) if "small" in kind else 14  # 10 x 10 pixels are just enough to count.
            value = {"one": label * 1000 + place, "small": label * 1000 + place, "void": 4}.get(kind, label)
            pixels[top : top + side, left : left + side] = value
        Image.fromarray(pixels).save(instances(city, number))


def found_in(city: Path, rng: np.random.Generator) -> Detections:
    """Squares around what is there, moved and of other sizes, with scores that are often equal."""
    rows = []
    for number in range(5):
        pixels = np.asarray(Image.open(instances(city, number))).astype(int)
        for top, left in ((row, column) for row in (0, 16, 32) for column in (0, 16, 32, 48)):
            there = pixels[top, left] if pixels[top, left] < 1000 else pixels[top, left] // 1000
            for _ in range(3):
                down, right, side = rng.integers(0, 3), rng.integers(0, 3), rng.choice([7, 11, 13, 14, 15])
                label = IDS.index(there) if there in IDS and rng.random() < 0.8 else int(rng.choice([0, 2, 7]))
                mask = np.zeros((48, 64), np.uint8)
                mask[top + down : top + down + side, left + right : left + right + side] = 1
                rows.append((number, label, rng.integers(1, 15) / 16, mask))
    rows.append((0, 2, 0.9, np.zeros((48, 64), np.uint8)))
    image, classes, scores, masks = zip(*rows, strict=True)
    return Detections(
        image=np.array(image),
        boxes=np.zeros((len(rows), 4), np.float32),
        classes=np.array(classes),
        scores=np.array(scores, np.float32),
        masks=[encoded_masks(each[None])[0] for each in masks],
    )


def naive(city: Path, found: Detections, label: int, threshold: float) -> float | None:
    """The benchmark's rules, a pixel and a score at a time."""
    from faster_coco_eval.core import mask

    void = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]
    marks, num_missed, num_objects = [], 0, 0
    for number in range(5):
        pixels = np.asarray(Image.open(instances(city, number))).astype(int)
        there = [each for each in np.unique(pixels) if (each if each < 1000 else each // 1000) == IDS[label]]
        masks = {
            row: mask.decode(dict(found.masks[row])) > 0
            for row in np.flatnonzero((found.image == number) & (found.classes == label))
        }
        masks = {row: each for row, each in masks.items() if each.any()}

        def overlap(row, each, masks=masks, pixels=pixels):
            return (masks[row] & (pixels == each)).sum() / (masks[row] | (pixels == each)).sum()

        for each in there:
            if each < 1000 or (pixels == each).sum() < 100:
                continue
            num_objects += 1
            scores = sorted(found.scores[row] for row in masks if overlap(row, each) > threshold)
            num_missed += not scores
            marks += [(score, place == len(scores) - 1) for place, score in enumerate(scores)]
        for row, own in masks.items():
            if any(overlap(row, each) > threshold for each in there):
                continue
            ignored = (own & np.isin(pixels, void)).sum()
            for each in there:
                ignored += (each < 1000) * (own & (pixels == each)).sum()
                ignored += ((pixels == each).sum() < 100) * (own & (pixels == each)).sum()
            if ignored / own.sum() <= threshold:
                marks.append((found.scores[row], False))
    if not num_objects:
        return None
    num_right = sum(right for _, right in marks)
    points = []
    for level in sorted({score for score, _ in marks}):
        above = [right for score, right in marks if score >= level]
        points.append((sum(above) / len(above), sum(above) / (num_right + num_missed)))
    if not points:
        return 0.0
    points.append((points[-1][0], 0.0))
    recalls = [points[0][1], *(recall for _, recall in points), 0.0]
    return sum(precision * (recalls[place] - recalls[place + 2]) / 2 for place, (precision, _) in enumerate(points))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_measure_is_that_of_the_benchmarks_rules(city, seed) -> None:
    rng = np.random.default_rng(seed)
    busy(city, rng)
    data, found = read(city), found_in(city, rng)
    [(kind, got)] = cityscapes_precision(found, data).items()
    assert kind == "mask"
    wanted = {name: [naive(city, found, label, each) for each in OVERLAPS[::3]] for label, name in enumerate(NAMES)}
    wanted = {name: each for name, each in wanted.items() if each[0] is not None}
    assert {each.name for each in got} == set(wanted)
    assert any(0.05 < each.mean < 0.95 for each in got)
    for each in got:
        np.testing.assert_allclose(each.at[::3], wanted[each.name], atol=1e-9)


def test_all_found_and_nothing_found(city) -> None:
    data = read(city)
    masks = [each for image in data.images for each in image.outlines]
    counts = [len(image.boxes) for image in data.images]
    found = Detections(
        image=np.repeat(np.arange(5), counts),
        boxes=np.concatenate([image.boxes for image in data.images]),
        classes=np.concatenate([image.classes for image in data.images]),
        scores=np.linspace(0.9, 0.1, len(masks)).astype(np.float32),
        masks=masks,
    )
    assert {each.mean for each in cityscapes_precision(found, data)["mask"]} == {1}
    nothing = cityscapes_precision(found.chosen(np.empty(0, np.int64)), data)["mask"]
    assert [(each.name, each.mean) for each in nothing] == [("person", 0), ("car", 0)]


def test_precision_over_recall_is_summed_by_trapezoids() -> None:
    # Scores 3 (right), 2 (wrong), 1 (right), one missed: (precision, recall) 2/3 2/3, 1/2 1/3, 1 1/3, and 1 at 0.
    found = step_precision(np.array([3.0, 1.0]), np.array([2.0]), num_missed=1)
    assert found == pytest.approx((2 / 3 * (2 / 3 - 1 / 3) + 1 / 2 * (2 / 3 - 1 / 3) + 1 * (1 / 3) + 1 * (1 / 3)) / 2)
    assert step_precision(np.empty(0), np.array([2.0]), num_missed=1) == 0
