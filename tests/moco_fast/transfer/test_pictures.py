import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moco_fast.transfer.coco import encoded_masks
from moco_fast.transfer.galleries import detection_gallery, match_images, pixel_gallery
from moco_fast.transfer.keypoints import Keypoints
from moco_fast.transfer.metrics import Detections
from moco_fast.transfer.pictures import Gallery, choose, color_of
from moco_fast.transfer.pixel_sets import read_pixel_sets
from moco_fast.transfer.presets import SEGMENT_PRESETS
from moco_fast.transfer.sets import DetectionSet
from tests.moco_fast.transfer.coco_shapes import write_coco
from tests.moco_fast.transfer.pixel_shapes import write_voc_pixels
from tests.moco_fast.transfer.tiny import two_sets


def as_found(truth: DetectionSet, *, only: int | None = None, score: float = 0.9) -> Detections:
    """All objects of a set, or of one of its images, as detections."""
    rows = [(number, image) for number, image in enumerate(truth.images) if only in (None, number)]
    masks = None
    if truth.annotations is not None:
        from moco_fast.transfer.coco import drawn_masks

        masks = [
            runs
            for _, image in rows
            for runs in encoded_masks(drawn_masks(image, height=image.height, width=image.width, is_mirrored=False))
        ]
    num = sum(len(image.boxes) for _, image in rows)
    return Detections(
        image=np.concatenate([np.full(len(image.boxes), number) for number, image in rows]),
        boxes=np.concatenate([image.boxes for _, image in rows]),
        classes=np.concatenate([image.classes for _, image in rows]),
        scores=np.full(num, score, np.float32),
        masks=masks,
    )


def joined(*parts: Detections) -> Detections:
    names = ("image", "boxes", "classes", "scores")
    return Detections(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@pytest.fixture
def truth(tmp_path) -> DetectionSet:
    return two_sets(tmp_path, train=1, test=5)[1]


def naive_f1(found: Detections, truth: DetectionSet, number: int, score: float) -> float:
    """Each detection, by falling score, takes the free object of its class that it overlaps most."""
    image, free, right, wrong = truth.images[number], set(range(len(truth.images[number].boxes))), 0, 0
    for row in sorted(np.flatnonzero(found.image == number), key=lambda row: -found.scores[row]):
        if found.scores[row] < score:
            continue
        overlaps = {}
        for place in free:
            a, b = found.boxes[row].astype(float), image.boxes[place].astype(float)
            sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
            union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - np.prod(sides)
            if image.classes[place] == found.classes[row]:
                overlaps[place] = np.prod(sides) / union
        best = max(overlaps, key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= 0.5:
            free.remove(best)
            right += 1
        else:
            wrong += 1
    return 2 * right / (2 * right + wrong + len(free))


@pytest.mark.parametrize("seed", range(4))
def test_images_are_matched_as_a_naive_loop_does_at_the_best_score(truth, seed) -> None:
    rng = np.random.default_rng(seed)
    plain = joined(as_found(truth), as_found(truth), as_found(truth))
    found = Detections(
        image=plain.image,
        boxes=plain.boxes + rng.normal(0, 4, plain.boxes.shape).astype(np.float32),
        classes=np.where(rng.random(len(plain)) < 0.8, plain.classes, (plain.classes + 1) % 3),
        scores=rng.choice(np.linspace(0.1, 0.9, 9, dtype=np.float32), len(plain)),
    )
    matches = match_images(found, truth)
    for number in range(len(truth)):
        assert matches.f1[number] == pytest.approx(naive_f1(found, truth, number, matches.score))

    def total(score: float) -> float:
        drawn = found.scores >= score
        return 2 * (matches.is_right & drawn).sum() / (drawn.sum() + sum(len(each.boxes) for each in truth.images))

    assert total(matches.score) == max(total(score) for score in found.scores)


def test_difficult_objects_count_neither_way(truth) -> None:
    image = truth.images[0]
    image.is_difficult[0] = True
    matches = match_images(joined(as_found(truth), as_found(truth)), truth)
    # Every object was found twice; the second detection of the difficult one is not wrong.
    num = len(image.boxes)
    assert matches.f1[0] == pytest.approx(2 * (num - 1) / (3 * (num - 1)))
    image.is_difficult[:] = True
    assert np.isnan(match_images(as_found(truth), truth).f1[0])


def test_without_anything_right_what_scores_a_half_is_drawn(truth) -> None:
    found = as_found(truth)
    found.classes[:] = (found.classes + 1) % 3
    matches = match_images(found, truth)
    assert (matches.score, matches.is_right.any(), matches.f1.max()) == (0.5, False, 0.0)
    nothing = Detections(
        image=np.empty(0, np.int64), boxes=np.empty((0, 4), np.float32), classes=np.empty(0, np.int64),
        scores=np.empty(0, np.float32),
    )  # fmt: skip
    assert match_images(nothing, truth).f1.tolist() == [0.0] * 5


def test_a_gallery_of_detections_has_what_was_marked_and_found(truth, tmp_path) -> None:
    truth.images[3].path.write_bytes(b"")
    gallery = detection_gallery(joined(as_found(truth, only=2), as_found(truth, only=4, score=0.8)), truth)
    assert set(gallery.chosen.best) == {2, 4}
    assert gallery.images[2].value == 1.0
    assert 3 not in gallery.images
    assert [mark.is_matched for mark in gallery.images[0].truth.marks] == [False] * len(truth.images[0].boxes)
    marks = gallery.images[4].found.marks
    assert [mark.text for mark in marks] == [f"{truth.class_names[each]} 0.80" for each in truth.images[4].classes]
    np.testing.assert_allclose([mark.box for mark in marks], truth.images[4].boxes, atol=0.05)
    gallery.write(tmp_path / "pictures" / "a.json")
    assert Gallery.read(tmp_path / "pictures" / "a.json") == gallery


def test_masks_lie_over_images_where_they_are(tmp_path) -> None:
    from moco_fast.transfer.coco import read_coco

    truth = read_coco([str(write_coco(tmp_path / "coco", {"val2017": 2}))], ["val2017"], option="")
    image = detection_gallery(as_found(truth), truth).images[0]
    assert image.truth.layer == image.found.layer
    layer = opened(image.truth.layer).convert("RGBA")
    assert layer.size == (image.width, image.height)
    for mark in image.truth.marks:
        left, top, _, _ = mark.box
        assert layer.getpixel((int(left + 2), int(top + 2)))[:3] == color_of(mark.label)
    assert layer.getpixel((0, 0))[3] == 0 or any(mark.box[:2] == (0, 0) for mark in image.truth.marks)


def test_keypoints_are_drawn_with_the_lines_between_those_that_are_there(truth, tmp_path) -> None:
    skeleton = Keypoints(names=("a", "b", "c"), partners=(0, 1, 2), sigmas=(0.1,) * 3, lines=((0, 1), (1, 2)))
    points = np.array([[3, 4, 2], [10, 20, 1], [0, 0, 0]], np.float32)
    images = [replace(image, keypoints=np.stack([points] * len(image.boxes))) for image in truth.images]
    truth = replace(truth, keypoints=skeleton, images=images)
    found = replace(as_found(truth), keypoints=np.concatenate([image.keypoints for image in images]))
    gallery = detection_gallery(found, truth)
    for panel in (gallery.images[0].truth, gallery.images[0].found):
        assert panel.marks[0].keypoints == ((3.0, 4.0), (10.0, 20.0))
        assert panel.marks[0].lines == ((3.0, 4.0, 10.0, 20.0),)
    gallery.write(tmp_path / "a.json")
    assert Gallery.read(tmp_path / "a.json") == gallery


def opened(url: str) -> Image.Image:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_gallery_of_pixels_names_areas_within_themselves(tmp_path) -> None:
    write_voc_pixels(tmp_path / "VOC2012", {"train_aug": 1, "val": 3})
    truth = read_pixel_sets([str(tmp_path)], SEGMENT_PRESETS["voc-semantic"])[1]
    shown: list[str] = []

    def name(image: Image.Image) -> np.ndarray:
        shown.append("")
        return np.full((image.height, image.width), 7)

    gallery = pixel_gallery(np.array([0.25, np.nan, 0.75]), truth, name)
    assert (gallery.chosen.best, gallery.chosen.worst, set(gallery.images)) == ((2,), (0,), {0, 2})
    assert len(shown) == 2
    image = gallery.images[2]
    assert [mark.text for mark in image.found.marks] == [truth.class_names[7]]
    assert image.found.marks[0].point == (31.0, 23.0) or image.found.marks[0].point == (32.0, 24.0)
    classes = np.asarray(Image.open(truth.images[2].classes))
    for mark in image.truth.marks:
        x, y = mark.point
        assert classes[int(y), int(x)] == mark.label


@given(st.lists(st.one_of(st.just(np.nan), st.floats(0, 1)), max_size=40))
def test_chosen_images_are_the_extremes_and_none_is_both(values) -> None:
    chosen = choose(np.array(values, dtype=np.float64))
    shown = [number for number, value in enumerate(values) if np.isfinite(value)]
    assert not set(chosen.best) & set(chosen.worst)
    assert set(chosen.all) <= set(shown)
    assert len(chosen.best) == min(4, (len(shown) + 1) // 2)
    assert len(chosen.worst) == min(4, len(shown) // 2)
    rest = [values[number] for number in shown if number not in (*chosen.best, *chosen.worst)]
    if rest:
        assert min(values[number] for number in chosen.best) >= max(rest)
        assert max(values[number] for number in chosen.worst) <= min(rest)
    assert list(chosen.spread) == sorted(set(chosen.spread))


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"measure": "", "chosen": {}, "images": {}})])
def test_a_damaged_file_of_pictures_is_named(text, tmp_path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not a file of pictures"):
        Gallery.read(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b\.json is not there"):
        Gallery.read(tmp_path / "b.json")
