import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from moco_fast.transfer.coco import drawn_masks, encoded_masks
from moco_fast.transfer.detecting import mean_values, values
from moco_fast.transfer.layouts import read_sets
from moco_fast.transfer.loader import TrainingImages
from moco_fast.transfer.lvis import lvis_precision, read_lvis
from moco_fast.transfer.metrics import OVERLAPS, Detections
from moco_fast.transfer.order import repeat_factors
from moco_fast.transfer.presets import PRESETS
from pipelines.world import World
from tests.moco_fast.transfer.lvis_shapes import write_lvis


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    return write_lvis(tmp_path / "lvis", {"train": 4, "val": 8})


def read(lvis: Path, part: str = "lvis_v0.5_val"):
    return read_lvis([str(lvis)], [part], option="--test")


def change(lvis: Path, made) -> dict:
    path = lvis / "lvis_v0.5_val.json"
    told = json.loads(path.read_text())
    made(told)
    path.write_text(json.dumps(told))
    return told


def test_both_versions_are_read_with_the_frequencies_of_their_classes(tmp_path) -> None:
    for version in ("v0.5", "v1"):
        folder = write_lvis(tmp_path / version, {"val": 3}, version=version)
        found = read(folder, f"lvis_{version}_val")
        assert found.class_names == ("bus", "car", "cat")
        assert found.groups == ("rare", "common", "frequent")
        assert [image.key for image in found.images] == [f"val2017/{number:012}.jpg" for number in (100, 101, 102)]
        assert all(image.path.is_file() for image in found.images)
        assert (found.malformed, found.malformed_objects) == ([], [])


def test_an_image_is_found_where_its_address_says_and_otherwise_where_it_is(lvis, tmp_path) -> None:
    # Version 1 tests on images that are in train2017, too; the images may lie in a folder of their own.
    images = tmp_path / "images"
    (images / "train2017").mkdir(parents=True)
    (lvis / "val2017" / "000000000106.jpg").rename(images / "train2017" / "000000000106.jpg")
    change(lvis, lambda told: told["images"][6].update(coco_url="http://images.cocodataset.org/val2014/1.jpg"))
    found = read_lvis([str(lvis), str(images)], ["lvis_v0.5_val"], option="--test")
    assert found.images[6].key == "train2017/000000000106.jpg"
    assert len(found) == 8


def test_an_image_that_is_not_there_is_named_as_its_address_says(lvis) -> None:
    (lvis / "val2017" / "000000000106.jpg").unlink()
    [malformed] = read(lvis).malformed
    assert (malformed.key, malformed.reason) == ("val2017/000000000106.jpg", "has no image")


def test_what_is_not_lvis_is_refused(lvis) -> None:
    with pytest.raises(ValueError, match=r"--test lvis_v1_val: there must be one lvis_v1_val.json .* there are 0"):
        read(lvis, "lvis_v1_val")
    with pytest.raises(ValueError, match="one part to train on"):
        read_lvis([str(lvis)], ["a", "b"], option="--train")
    change(lvis, lambda told: told["categories"][1].pop("frequency"))
    with pytest.raises(ValueError, match="frequency of its category car is not r, c or f"):
        read(lvis)
    with pytest.raises(ValueError, match="--classes means nothing for lvis"):
        read_sets([str(lvis)], PRESETS["lvis-fpn-2x"], class_names=("car",))
    change(lvis, lambda told: told["images"][0].pop("file_name"))
    change(lvis, lambda told: told["images"][0].pop("coco_url"))
    with pytest.raises(ValueError, match=r"not a file of COCO's instances .*coco_url"):
        read(lvis)


@pytest.mark.parametrize(
    ("name", "consequence"), [("neg_category_ids", "too high"), ("not_exhaustive_category_ids", "too low")]
)
def test_a_test_set_that_does_not_list_classes_is_refused_before_the_training(lvis, name, consequence) -> None:
    parts = ("lvis_v0.5_val",)
    preset = replace(PRESETS["lvis-fpn-2x"], train=parts, test=parts)
    for spoil in (lambda image: image.update({name: None}), lambda image: image.pop(name)):
        change(lvis, lambda told, spoil=spoil: spoil(told["images"][2]))
        with pytest.raises(ValueError, match=rf"has no list {name} of its image 102, .* {consequence}"):
            read_sets([str(lvis)], preset, class_names=None)


def test_lists_of_classes_may_be_text(lvis) -> None:
    data = read(lvis)
    found = found_in(data, np.random.default_rng(0))
    before = lvis_precision(found, data)
    for name in ("neg_category_ids", "not_exhaustive_category_ids"):
        change(lvis, lambda told, name=name: [each.update({name: [*map(str, each[name])]}) for each in told["images"]])
    assert lvis_precision(found, data) == before


def found_in(data, rng: np.random.Generator, *, per_object: int = 3) -> Detections:
    """Objects as they are, moved, or under another class, with scores that are often equal."""
    rows = []
    for number, image in enumerate(data.images):
        masks = drawn_masks(image, height=image.height, width=image.width, is_mirrored=False)
        for box, label, mask in zip(image.boxes, image.classes, masks, strict=True):
            for _ in range(per_object):
                shift = int(rng.integers(0, 6))
                rows.append(
                    (
                        number,
                        box + np.array([shift, 0, shift, 0]),
                        label if rng.random() < 0.6 else rng.integers(3),
                        rng.integers(1, 20) / 20,
                        np.roll(mask, shift, axis=1),
                    )
                )
    rows = [rows[place] for place in rng.permutation(len(rows))]
    image, boxes, classes, scores, masks = zip(*rows, strict=True)
    return Detections(
        image=np.array(image),
        boxes=np.array(boxes, np.float32),
        classes=np.array(classes),
        scores=np.array(scores, np.float32),
        masks=[encoded_masks(each[None])[0] for each in masks],
    )


def overlap_of(kind: str, found: Detections, row: int, told: dict, size: tuple[int, int]) -> float:
    if kind == "box":
        x, y, wide, high = told["bbox"]
        marked = (x, y, x + wide, y + high)
        box = found.boxes[row]
        shared = max(0, min(box[2], marked[2]) - max(box[0], marked[0])) * max(
            0, min(box[3], marked[3]) - max(box[1], marked[1])
        )
        return shared / ((box[2] - box[0]) * (box[3] - box[1]) + wide * high - shared)
    from faster_coco_eval.core import mask

    drawn = mask.decode(mask.merge(mask.frPyObjects(told["segmentation"], *size)))
    own = mask.decode(dict(found.masks[row]))
    return np.logical_and(drawn, own).sum() / np.logical_or(drawn, own).sum()


def naive(kind: str, found: Detections, told: dict, category: int, label: int, threshold: float) -> float | None:
    """The rules, one class and overlap at a time: who is matched, who is passed over, 101 recalls."""
    hits: list[tuple[float, bool]] = []
    num_objects = 0
    for number, image in enumerate(told["images"]):
        objects = [
            each for each in told["annotations"] if (each["image_id"], each["category_id"]) == (image["id"], category)
        ]
        num_objects += len(objects)
        if not objects and category not in image["neg_category_ids"]:
            continue
        best = sorted(np.flatnonzero(found.image == number), key=lambda row: -found.scores[row])[:300]
        used = set()
        for row in (row for row in best if found.classes[row] == label):
            most, chosen = threshold, None
            for place, each in enumerate(objects):
                overlap = overlap_of(kind, found, row, each, (image["height"], image["width"]))
                if place not in used and overlap >= most:
                    most, chosen = overlap, place
            if chosen is None and category in image["not_exhaustive_category_ids"]:
                continue
            used.add(chosen)
            hits.append((found.scores[row], chosen is not None))
    if not num_objects:
        return None
    right = np.cumsum([hit for _, hit in sorted(hits, key=lambda each: -each[0])])
    precision, recall = right / np.arange(1, len(right) + 1), right / num_objects
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)]))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_federated_measure_is_that_of_the_rules(lvis, seed) -> None:
    told = json.loads((lvis / "lvis_v0.5_val.json").read_text())
    data = read(lvis)
    found = found_in(data, np.random.default_rng(seed))
    got = lvis_precision(found, data)
    for kind in ("box", "mask"):
        at = {each.name: each.at for each in got[kind]}
        for label, (name, category) in enumerate(zip(data.class_names, data.category_ids, strict=True)):
            wanted = [naive(kind, found, told, category, label, threshold) for threshold in OVERLAPS[::3]]
            np.testing.assert_allclose(at[name][::3], wanted, atol=1e-6)


def test_each_rule_of_federation_changes_the_figure(lvis) -> None:
    """An object is found, and before it something else of the same class in another image."""

    def alone(told: dict) -> None:
        first = next(each for each in told["annotations"] if each["image_id"] == 100)
        first["category_id"] = 7
        told["annotations"] = [first]
        told["images"][0]["not_exhaustive_category_ids"] = []
        told["images"][1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}

    change(lvis, alone)
    data = read(lvis)
    box = data.images[0].boxes[0]
    found = Detections(
        image=np.array([0, 0, 1]),
        boxes=np.array([box, [0, 0, 3, 3], [0, 0, 9, 9]], np.float32),
        classes=np.array([0, 0, 0]),
        scores=np.array([0.5, 0.4, 0.9], np.float32),
    )

    def ap() -> float:
        [bus] = lvis_precision(found, read(lvis))["box"]
        assert (bus.name, bus.num_objects, bus.group) == ("bus", 1, "rare")
        return bus.at[0]

    # Nothing is known of the class in the second image; then it is known not to be there.
    assert ap() == pytest.approx(1)
    change(lvis, lambda told: told["images"][1].update(neg_category_ids=[7]))
    assert ap() == pytest.approx(0.5)
    # What else is found in the first image is an error, unless not all is marked there.
    found.scores[:] = (0.5, 0.9, 0.1)
    assert ap() == pytest.approx(0.5)
    change(lvis, lambda told: told["images"][0].update(not_exhaustive_category_ids=[7]))
    assert ap() == pytest.approx(1)


def test_only_the_best_300_of_an_image_count(lvis) -> None:
    data = read(lvis)
    box, label = data.images[1].boxes[0], data.images[1].classes[0]
    others = Detections(
        image=np.array([*[0] * 300, *[1] * 301]),
        boxes=np.array([*[[0, 0, 2, 2]] * 600, box], np.float32),
        classes=np.array([*[(label + 1) % 3] * 600, label]),
        scores=np.array([*[0.9] * 600, 0.8], np.float32),
    )

    def mean(found: Detections) -> float:
        [there] = [each.mean for each in lvis_precision(found, data)["box"] if each.name == data.class_names[label]]
        return there

    assert mean(others) == 0
    assert mean(others.chosen(np.delete(np.arange(601), 300))) > 0


def test_figures_are_means_over_classes_and_over_frequencies(lvis) -> None:
    data = read(lvis)
    of_masks = lvis_precision(found_in(data, np.random.default_rng(0)), data)["mask"]
    figures = mean_values(of_masks, ("AP", "AP50", "APr", "APf"))
    by_name = {each.name: values(each) for each in of_masks}
    assert figures["APr"] == by_name["bus"]["AP"]
    assert figures["APf"] == by_name["cat"]["AP"]
    assert figures["AP50"] == pytest.approx(np.mean([each["AP50"] for each in by_name.values()]))
    # A set without rare classes has no figure of them.
    assert "APr" not in mean_values([each for each in of_masks if each.group != "rare"], ("AP", "APr"))


def test_nothing_found_is_measured_too(lvis) -> None:
    data = read(lvis)
    nothing = found_in(data, np.random.default_rng(0)).chosen(np.empty(0, np.int64))
    assert {each.mean for of_kind in lvis_precision(nothing, data).values() for each in of_kind} == {0}


def test_repeated_images_are_the_same_on_two_ranks_and_after_a_resume(lvis) -> None:
    data = read(lvis).with_boxes
    preset = replace(PRESETS["lvis-fpn-2x"], batch_size=4, group=2, sides=(16, 24), longest=40, repeat_threshold=2.0)

    def batches(step: int, num: int, **of_rank) -> list:
        world = World(**of_rank)
        with TrainingImages(data, preset, seed=3, world=world, threads=1, at_most_damaged=0) as images:
            return [[each.numpy() for each in batch.images] for batch in islice(images.batches(step), num)]

    whole = batches(0, 9)
    halves = [batches(4, 5, rank=rank, world_size=2, local_world_size=2) for rank in (0, 1)]
    for wanted, *parts in zip(whole[4:], *halves, strict=True):
        found = [image for part in parts for image in part]
        assert [image.tobytes() for image in found] == [image.tobytes() for image in wanted]
        # Grouped: the two images of a rank lie, or stand.
        assert all(
            (image.shape[2] > image.shape[1]) == (part[0].shape[2] > part[0].shape[1])
            for part in parts
            for image in part
        )
    # An epoch is longer than the set.
    factors = repeat_factors([image.classes for image in data.images], threshold=2.0)
    assert factors.sum() > 1.2 * len(data)
