import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits

from moco_fast.transfer.coco import coco_precision, drawn_masks, encoded_masks, read_coco
from moco_fast.transfer.detecting import find_all
from moco_fast.transfer.heads import AlignedRegions, mask_loss, mask_targets
from moco_fast.transfer.layouts import read_sets, refuse_unmarked, without_masks
from moco_fast.transfer.loader import augmented
from moco_fast.transfer.metrics import OVERLAPS, Detections
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.presets import PRESETS
from moco_fast.transfer.training import Machine
from tests.moco_fast.transfer.coco_shapes import an_object, write_coco
from tests.moco_fast.transfer.tiny import TINY, tiny_resnet

CPU = torch.device("cpu")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", {"train2017": 6, "val2017": 3})


def read(coco: Path, part: str = "val2017"):
    return read_coco([str(coco)], [part], option="--test")


def change(coco: Path, part: str = "val2017", **fields) -> dict:
    path = coco / "annotations" / f"instances_{part}.json"
    told = json.loads(path.read_text())
    for name, values in fields.items():
        told[name] += values
    path.write_text(json.dumps(told))
    return told


def test_boxes_classes_and_outlines_are_those_of_the_file(coco) -> None:
    told = change(coco)
    found = read(coco)
    assert (found.class_names, found.category_ids) == (("bus", "car", "cat"), (7, 11, 30))
    objects = [each for each in told["annotations"] if each["image_id"] == 101]
    image = found.images[1]
    assert image.image_id == 101
    x, y, wide, high = np.array([each["bbox"] for each in objects]).T
    np.testing.assert_array_equal(image.boxes, np.stack([x, y, x + wide, y + high], axis=1))
    assert [found.category_ids[number] for number in image.classes] == [each["category_id"] for each in objects]
    assert [each[0].ravel().tolist() for each in image.outlines] == [each["segmentation"][0] for each in objects]


BROKEN = {
    "has a box without an area in the image": {"bbox": [3, 3, 0, 9]},
    "has a box without four numbers": {"bbox": [3, 3, 9]},
    "is of an unknown category": {"category_id": 8},
    "has no outline (--masks False does without)": {"segmentation": [[1, 2, 3, 4]]},
    "has an outline that is not lists of numbers": {"segmentation": [["a"] * 6]},
    "has run lengths that cannot be read": {"segmentation": {"size": [64, 96]}},
    "has run lengths of another size than its image": {"segmentation": {"size": [64, 96], "counts": [3, 4]}},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_an_object_that_cannot_be_used_is_left_out_with_a_reason(coco, reason) -> None:
    before = len(read(coco).images[0].boxes)
    change(coco, annotations=[an_object(999, 100, 7, (5, 5, 20, 20), [[5, 5, 25, 5, 25, 25]]) | BROKEN[reason]])
    found = read(coco)
    assert [(each.key, each.reason) for each in found.malformed_objects] == [("999", reason)]
    assert len(found.images[0].boxes) == before


# COCO counts what has no outline or no area, which nothing can overlap.
@pytest.mark.parametrize("reason", [each for each in BROKEN if "no outline" not in each and "area" not in each])
def test_what_the_measure_cannot_read_does_not_end_a_test(coco, reason) -> None:
    broken = an_object(999, 100, 7, (5, 5, 20, 20), [[5, 5, 25, 5, 25, 25]]) | BROKEN[reason]
    change(coco, annotations=[broken])
    data = read(coco)
    counted = {kind: {each.mean for each in found} for kind, found in coco_precision(all_of(data), data).items()}
    assert counted == {"box": {1}, "mask": {1}}


@pytest.mark.parametrize("numbers", [None, 0, 1])
def test_objects_need_no_numbers_of_their_own(coco, numbers) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    told = json.loads(path.read_text())
    for place, each in enumerate(told["annotations"]):
        del each["id"], each["area"], each["iscrowd"]
        each |= {} if numbers is None else {"id": numbers * 7 or place}
    path.write_text(json.dumps(told))
    data = read(coco)
    counted = {kind: {each.mean for each in found} for kind, found in coco_precision(all_of(data), data).items()}
    assert counted == {"box": {1}, "mask": {1}}


def test_numbers_may_be_text(coco) -> None:
    before = read(coco)
    path = coco / "annotations" / "instances_val2017.json"
    told = json.loads(path.read_text())
    for each in told["annotations"]:
        each |= {name: str(each[name]) for name in ("category_id", "image_id", "iscrowd", "area")}
        each |= {"bbox": [*map(str, each["bbox"])], "segmentation": [[*map(str, each["segmentation"][0])]]}
    path.write_text(json.dumps(told))
    data = read(coco)
    assert data.malformed_objects == []
    for image, same in zip(before.images, data.images, strict=True):
        np.testing.assert_array_equal(image.boxes, same.boxes)
        np.testing.assert_array_equal(image.classes, same.classes)
    counted = {kind: {each.mean for each in found} for kind, found in coco_precision(all_of(data), data).items()}
    assert counted == {"box": {1}, "mask": {1}}


@pytest.mark.parametrize(
    "outline", [[[[5, 5], [25, 5], [25, 25]] * 2], [5, 5, 25, 5, 25, 25], [[5, 5, 25, None, 25, 25]]]
)
def test_an_outline_of_another_form_is_neither_learned_nor_measured(coco, outline) -> None:
    change(coco, annotations=[an_object(999, 100, 7, (5, 5, 20, 20), outline)])
    data = read(coco)
    assert [each.reason for each in data.malformed_objects] == ["has an outline that is not lists of numbers"]
    assert {each.mean for each in coco_precision(all_of(data), data)["mask"]} == {1}


def test_boxes_that_are_shares_are_refused(coco) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    told = json.loads(path.read_text())
    for each in told["annotations"]:
        each["bbox"] = [side / 96 for side in each["bbox"]]
    path.write_text(json.dumps(told))
    train, test = read_sets([str(coco)], PRESETS["coco-c4-1x"], class_names=None)
    with pytest.raises(ValueError, match=r"all boxes of .*val2017 lie within the first 2 pixels"):
        refuse_unmarked(train, test, PRESETS["coco-c4-1x"])


def drop_outlines(coco: Path, *parts: str) -> None:
    for number, part in enumerate(parts):
        path = coco / "annotations" / f"instances_{part}.json"
        told = json.loads(path.read_text())
        for each in told["annotations"]:
            each |= {"segmentation": [[], [[]], None][number]}
        told["annotations"][0].pop("segmentation")
        path.write_text(json.dumps(told))


def test_sets_without_any_outline_are_trained_and_tested_on_boxes_alone(coco) -> None:
    preset = PRESETS["coco-fpn-1x"]
    whole = read_sets([str(coco)], preset, class_names=None)
    assert without_masks(preset, *whole, asked=True) == (preset, *whole, [])
    # The test's own outlines cannot be learned from where training has none, and the other way round.
    for part in ("train2017", "val2017"):
        drop_outlines(coco, part)
        train, test = read_sets([str(coco)], preset, class_names=None)
        assert not train.malformed_objects
        assert not test.malformed_objects
        settled, *sets, notes = without_masks(preset, train, test, asked=False)
        assert settled == replace(preset, masks=False)
        assert [each.has_outlines for each in sets] == [False, False]
        assert "has an outline: boxes alone are trained and tested, without masks" in notes[0]
        with pytest.raises(ValueError, match=r"--masks True, but no object of .* has an outline"):
            without_masks(preset, train, test, asked=True)
    found = replace(all_of(whole[1]), masks=None)
    assert {kind: {each.mean for each in found} for kind, found in coco_precision(found, test).items()} == {"box": {1}}


def test_a_set_of_which_no_image_is_left_is_not_said_to_have_no_outline(coco) -> None:
    for path in (coco / "val2017").iterdir():
        path.unlink()
    preset = PRESETS["coco-c4-1x"]
    found, _, test, notes = without_masks(preset, *read_sets([str(coco)], preset, class_names=None), asked=False)
    assert (found.masks, len(test), notes) == (True, 0, [])


def test_masks_that_are_not_asked_for_are_not_read(coco) -> None:
    change(coco, annotations=[an_object(999, 100, 7, (5, 5, 20, 20), [["a"] * 6])])
    preset = replace(PRESETS["coco-fpn-1x"], masks=False)
    _, test = read_sets([str(coco)], preset, class_names=None)
    assert not test.malformed_objects
    assert not test.has_outlines
    assert without_masks(preset, test, test, asked=False)[3] == []


def test_images_may_lie_in_folders(coco) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    told = json.loads(path.read_text())
    (coco / "val2017" / "a").mkdir()
    for each in told["images"]:
        (coco / "val2017" / each["file_name"]).rename(coco / "val2017" / "a" / each["file_name"])
        each["file_name"] = f"a/{each['file_name']}"
    path.write_text(json.dumps(told))
    found = read(coco)
    assert (len(found), found.malformed) == (3, [])


def test_images_and_categories_with_the_same_number_are_refused(coco) -> None:
    told = change(coco)
    change(coco, images=[told["images"][0]])
    with pytest.raises(ValueError, match="two images with the id 100"):
        read(coco)
    change(coco, "train2017", categories=[told["categories"][0]])
    with pytest.raises(ValueError, match="two categories with the id 7"):
        read(coco, "train2017")


def test_an_image_without_a_size_is_refused_with_what_is_missing(coco) -> None:
    change(coco, images=[{"id": 999, "file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r"not a file of COCO's instances .*height"):
        read(coco)


def test_images_of_another_size_are_found_before_the_training(coco) -> None:
    Image.new("RGB", (10, 10)).save(coco / "val2017" / "000000000101.jpg")
    found = read(coco)
    reason = "is of another size than its annotation says"
    assert [(each.key, each.reason) for each in found.malformed] == [("000000000101.jpg", reason)]


def test_a_set_knows_itself_by_crowds_and_outlines_too(coco) -> None:
    before = read(coco).identity
    change(coco, annotations=[an_object(999, 100, 7, (0, 0, 9, 9), [[0, 0, 9, 0, 9, 9]], crowd=1)])
    assert read(coco).identity != before


def test_an_image_that_is_not_there_is_left_out_and_not_measured(coco) -> None:
    (coco / "val2017" / "000000000101.jpg").unlink()
    found = read(coco)
    assert [(each.key, each.reason) for each in found.malformed] == [("000000000101.jpg", "has no image")]
    assert [image.image_id for image in found.images] == [100, 102]
    assert all(each.mean == 1 for each in coco_precision(all_of(found), found)["box"])


def test_sets_that_are_not_there_or_do_not_fit_are_refused(coco) -> None:
    preset = replace(PRESETS["coco-fpn-1x"], test=("val2014",))
    with pytest.raises(ValueError, match=r"--test val2014: .* is not there"):
        read_sets([str(coco)], preset, class_names=None)
    with pytest.raises(ValueError, match="--classes means nothing for coco"):
        read_sets([str(coco)], preset, class_names=("cat",))
    change(coco, categories=[{"id": 40, "name": "dog"}])
    with pytest.raises(ValueError, match="other categories"):
        read_sets([str(coco)], PRESETS["coco-fpn-1x"], class_names=None)
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of COCO's instances"):
        read(coco)


def all_of(data, *, shift: int = 0) -> Detections:
    """Every object of a set as a detection, `shift` pixels to the right."""
    boxes = [image.boxes + np.array([shift, 0, shift, 0]) for image in data.images]
    masks = [drawn_masks(image, height=image.height, width=image.width, is_mirrored=False) for image in data.images]
    counts = [len(each) for each in boxes]
    return Detections(
        image=np.repeat(np.arange(len(data)), counts),
        boxes=np.concatenate(boxes).astype(np.float32),
        classes=np.concatenate([image.classes for image in data.images]),
        scores=np.linspace(0.9, 0.1, sum(counts)).astype(np.float32),
        masks=[runs for each in masks for runs in encoded_masks(np.roll(each, shift, axis=2))],
    )


def naive_ap(rows, objects, threshold: float) -> float:
    """One class: rows (image, score, box), objects (image, box); 101 recalls, the best object that is left."""
    used, hits = set(), []
    for image, _, box in sorted(rows, key=lambda row: -row[1]):
        best, chosen = threshold, None
        for number, (other, marked) in enumerate(objects):
            if other != image or number in used:
                continue
            wide = max(0.0, min(box[2], marked[2]) - max(box[0], marked[0]))
            high = max(0.0, min(box[3], marked[3]) - max(box[1], marked[1]))
            areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, marked)]
            overlap = wide * high / (sum(areas) - wide * high)
            if overlap >= best:
                best, chosen = overlap, number
        used.add(chosen)
        hits.append(chosen is not None)
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / len(objects)
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)]))


def test_average_precision_of_boxes_is_that_of_the_rules(coco) -> None:
    data = read(coco)
    found = all_of(data, shift=4)
    rng = np.random.default_rng(0)
    found.boxes[::3] += 6
    found.classes[::4] = (found.classes[::4] + 1) % 3
    found = replace(found, scores=rng.permutation(found.scores))
    got = {each.name: each for each in coco_precision(found, data)["box"]}
    for number, name in enumerate(data.class_names):
        rows = [
            (image, score, box)
            for image, score, box, label in zip(found.image, found.scores, found.boxes, found.classes, strict=True)
            if label == number
        ]
        objects = [
            (index, box)
            for index, image in enumerate(data.images)
            for box, label in zip(image.boxes, image.classes, strict=True)
            if label == number
        ]
        assert got[name].num_objects == len(objects)
        wanted = [naive_ap(rows, objects, threshold) for threshold in OVERLAPS]
        np.testing.assert_allclose(got[name].at, wanted, atol=1e-6)


def test_masks_are_measured_by_themselves(coco) -> None:
    data = read(coco)
    perfect, shifted = (coco_precision(all_of(data, shift=shift), data) for shift in (0, 5))
    assert {kind: {each.mean for each in of_kind} for kind, of_kind in perfect.items()} == {"box": {1}, "mask": {1}}
    assert all(each.mean < 1 for each in shifted["mask"])
    nothing = Detections(
        image=np.empty(0, np.int64),
        boxes=np.empty((0, 4), np.float32),
        classes=np.empty(0, np.int64),
        scores=np.empty(0, np.float32),
        masks=[],
    )
    assert {each.mean for of_kind in coco_precision(nothing, data).values() for each in of_kind} == {0}


def test_a_detection_in_a_crowd_is_no_error(coco) -> None:
    runs = {"size": [64, 96], "counts": [0, 64 * 96]}
    told = change(coco)
    size = {image["id"]: (image["height"], image["width"]) for image in told["images"]}[100]
    runs = {"size": list(size), "counts": [0, size[0] * size[1]]}
    change(coco, annotations=[an_object(999, 100, 7, (0, 0, size[1], size[0]), runs, crowd=1)])
    data = read(coco)
    found = all_of(data)
    more = replace(
        found,
        image=np.append(found.image, 0),
        boxes=np.append(found.boxes, np.array([[1, 1, 9, 9]], np.float32), axis=0),
        classes=np.append(found.classes, 0),
        scores=np.append(found.scores, np.float32(0.99)),
        masks=[*found.masks, found.masks[0]],
    )
    assert {each.mean for each in coco_precision(more, data)["box"]} == {1}


def test_masks_follow_image_and_boxes(coco) -> None:
    image = read(coco, "train2017").images[0]
    for is_mirrored in (False, True):
        pixels, target = augmented(image, side=128, longest=400, is_mirrored=is_mirrored)
        assert target["masks"].shape == (len(image.boxes), *pixels.shape[1:])
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = torch.where(mask > 0)
            edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            torch.testing.assert_close(edges.float(), box, atol=1.5, rtol=0)


def test_run_lengths_are_drawn_as_polygons_are(coco) -> None:
    image = read(coco).images[0]
    drawn = drawn_masks(image, height=image.height, width=image.width, is_mirrored=False)
    flat = drawn[0].T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    size = [image.height, image.width]
    packed = encoded_masks(drawn[:1])[0]["counts"]
    for each in (counts, packed if isinstance(packed, str) else packed.decode()):
        runs = replace(image, outlines=[{"size": size, "counts": each}])
        again = drawn_masks(runs, height=image.height, width=image.width, is_mirrored=False)
        np.testing.assert_array_equal(again[0], drawn[0])


def test_targets_of_masks_are_the_cells_within_the_object() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:30, 10:20] = 1
    [found] = mask_targets([mask], [torch.tensor([[10.0, 10.0, 30.0, 30.0]])], cells=4)
    assert found.tolist() == [[1, 1, 0, 0]] * 4


def test_the_loss_of_masks_is_of_the_regions_own_classes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 2, 0, 1])
    mask = torch.zeros(2, 40, 40, dtype=torch.uint8)
    mask[:, 10:30, 10:20] = 1
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0]] * 2)
    targets = torch.tensor([[[1.0, 1, 0, 0]] * 4] * 2)
    wanted = binary_cross_entropy_with_logits(torch.stack([logits[0, 1], logits[1, 0]]), targets)
    torch.testing.assert_close(mask_loss(logits, labels, [mask], [boxes]), wanted)
    assert mask_loss(logits[:0], labels * 0, [mask[:0]], [boxes[:0]]).item() == 0


def test_a_region_is_taken_from_the_map_that_fits_its_size() -> None:
    maps = {
        str(number): torch.full((1, 1, 512 // stride, 512 // stride), float(number))
        for number, stride in enumerate((4, 8, 16, 32))
    }
    sides = (16, 111, 113, 223, 225, 447, 449, 500)
    boxes = [torch.tensor([[0.0, 0.0, side, side] for side in sides])]
    found = AlignedRegions(2, strides=[4, 8, 16, 32])(maps, boxes, [(512, 512)])
    assert found[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


HEADS = {
    "c4": replace(TINY, layout="coco", masks=True),
    "c5": replace(TINY, head="c5"),
    "fpn": replace(
        TINY,
        layout="coco",
        head="fpn",
        masks=True,
        anchor_sizes=(8, 16, 24, 32, 48),
        test_proposals=(50, 10),
        regions=8,
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_all_of_its_parameters_and_detects(head, coco) -> None:
    preset = HEADS[head]
    data = read(coco)
    detector = build_detector(tiny_resnet(), preset, num_classes=3, seed=0)
    items = [augmented(image, side=64, longest=96, is_mirrored=False) for image in data.images[:2]]
    losses = detector.train()([image for image, _ in items], [target for _, target in items])
    assert ("loss_mask" in losses) == preset.masks
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, value in detector.named_parameters() if value.grad is None] == []
    first = replace(data, images=data.images[:1])
    found, _ = find_all(detector, first, preset, Machine(device=CPU), stop=lambda _: None)
    assert (found.masks is not None) == preset.masks
    if preset.masks:
        assert len(found.masks) == len(found)
        assert set(coco_precision(found, first)) == {"box", "mask"}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "voc-c4"])
def test_every_preset_builds_with_a_resnet_50(name) -> None:
    from moco_fast.encoders.encoder import build_backbone
    from moco_fast.encoders.formats.base import without_head

    preset = PRESETS[name]
    with torch.device("meta"):
        encoder = without_head(build_backbone("resnet50"), 2048)
        detector = build_detector(encoder, preset, num_classes=80, seed=0, num_keypoints=17)
    shapes = {key: tuple(value.shape) for key, value in detector.named_parameters()}
    heads = "roi_heads."
    wanted = {
        "c4": {"box_head.norm.weight": (2048,), "mask_predictor.deconv.weight": (2048, 256, 2, 2)},
        "c5": {"box_head.fc6.weight": (1024, 512 * 49), "box_predictor.cls_score.weight": (81, 1024)},
        "fpn": {"box_head.3.1.weight": (256,), "box_head.5.weight": (1024, 256 * 49)},
    }[preset.head]
    if preset.keypoints:
        wanted |= {"keypoint_head.7.1.weight": (512,), "keypoint_predictor.kps_score_lowres.weight": (512, 17, 4, 4)}
    assert {key: shapes[heads + key] for key in wanted} == wanted
    if preset.masks:
        assert shapes[heads + "mask_predictor.predictor.weight"] == (80, 256, 1, 1)
        if preset.head == "fpn":
            assert shapes[heads + "mask_head.3.1.weight"] == (256,)
    if preset.head == "fpn":
        norms = [key for key in shapes if key.startswith("backbone.pyramid") and key.endswith("1.weight")]
        assert len(norms) == 8
        assert detector.backbone.strides == [4, 8, 16, 32, 64]
    if preset.head == "c5":
        convs = {
            layer.dilation for layer in detector.backbone.layer4.modules() if getattr(layer, "kernel_size", 0) == (3, 3)
        }
        assert (convs, detector.backbone.stride) == ({(2, 2)}, 16)


def test_schedules_are_those_of_the_configurations() -> None:
    drops = {name: [share * each.steps for share in each.drops] for name, each in PRESETS.items()}
    assert drops["coco-c4-1x"] == drops["coco-fpn-1x"] == pytest.approx([60_000, 80_000])
    assert drops["coco-c4-2x"] == drops["coco-fpn-2x"] == pytest.approx([120_000, 160_000])
    assert PRESETS["coco-c4-2x"].steps == 180_000
    assert PRESETS["coco-fpn-1x"].sides == (640, 672, 704, 736, 768, 800)
    lvis, city = PRESETS["lvis-fpn-2x"], PRESETS["cityscapes-instance"]
    assert (lvis.steps, lvis.detections, lvis.score_threshold, lvis.repeat_threshold) == (180_000, 300, 0.0001, 0.001)
    assert drops["lvis-fpn-2x"] == drops["coco-fpn-2x"]
    assert (city.batch_size, city.lr, city.steps, drops["cityscapes-instance"]) == (8, 0.01, 24_000, [18_000])
    assert (city.sides[0], city.sides[-1], city.test_side, city.longest) == (800, 1024, 1024, 2048)
