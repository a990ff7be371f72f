from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_fast.transfer.metrics import OVERLAPS, Detections, eleven_points, voc_precision
from moco_fast.transfer.sets import AnnotatedImage, DetectionSet


def image_of(boxes, classes, difficult, number=0):
    return AnnotatedImage(
        path=Path(f"{number}.jpg"),
        key=str(number),
        height=100,
        width=100,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array(classes, np.int64),
        is_difficult=np.array(difficult, bool),
    )


def set_of(*images, names=("a", "b")):
    return DetectionSet(where="here", class_names=names, images=images)


def found_in(rows):
    """Rows of (image, class, score, box)."""
    return Detections(
        image=np.array([row[0] for row in rows], np.int64),
        boxes=np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
        classes=np.array([row[1] for row in rows], np.int64),
        scores=np.array([row[2] for row in rows], np.float32),
    )


def naive_precision(rows, truth, number, threshold):
    """Average precision of a class, one detection after the other, as the VOC devkit's rules read."""
    objects = {
        (index, each): (image.boxes[each].astype(float) + np.array((1, 1, 0, 0)), image.is_difficult[each])
        for index, image in enumerate(truth.images)
        for each in range(len(image.boxes))
        if image.classes[each] == number
    }
    total = sum(not difficult for _, difficult in objects.values())
    if not total:
        return None
    rows = [(image, round(float(np.float32(score)), 3), box) for image, name, score, box in rows if name == number]
    rows = sorted(rows, key=lambda row: (-row[1], row[0]))
    used, right, wrong, points = set(), 0, 0, []
    for image, _, box in rows:
        box = [round(float(np.float32(value)) + shift, 1) for value, shift in zip(box, (1, 1, 0, 0), strict=True)]
        best, chosen = -1.0, None
        for key, (other, _) in objects.items():
            if key[0] != image:
                continue
            wide = max(0.0, min(box[2], other[2]) - max(box[0], other[0]) + 1)
            high = max(0.0, min(box[3], other[3]) - max(box[1], other[1]) + 1)
            areas = [(each[2] - each[0] + 1) * (each[3] - each[1] + 1) for each in (box, other)]
            overlap = wide * high / (sum(areas) - wide * high)
            if overlap > best:
                best, chosen = overlap, key
        if best > threshold:
            if not objects[chosen][1]:
                right, wrong = (right + 1, wrong) if chosen not in used else (right, wrong + 1)
                used.add(chosen)
        else:
            wrong += 1
        points.append((right / total, right / max(right + wrong, 1e-300)))
    return sum(max([p for r, p in points if r >= t] or [0.0]) for t in np.arange(0, 1.1, 0.1)) / 11


BOX = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2).map(
    lambda box: (10 * box[0], 10 * box[1], 10 * (box[0] + box[2]), 10 * (box[1] + box[3]))
)


@settings(max_examples=60)
@given(
    truths=st.lists(st.lists(st.tuples(BOX, st.integers(0, 1), st.booleans()), max_size=4), min_size=1, max_size=3),
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.1, 0.25, 0.5, 0.9]), BOX)),
)
def test_average_precision_is_that_of_the_rules_followed_one_by_one(truths, rows) -> None:
    truth = set_of(
        *(
            image_of(*(list(column) for column in zip(*each, strict=True) or [(), (), ()]))
            if each
            else image_of([], [], [])
            for each in truths
        )
    )
    rows = [row for row in rows if row[0] < len(truths)]
    got = {each.name: each.at for each in voc_precision(found_in(rows), truth)}
    for number, name in enumerate(truth.class_names):
        wanted = [naive_precision(rows, truth, number, threshold) for threshold in OVERLAPS]
        if wanted[0] is None:
            assert name not in got
        else:
            assert got[name] == pytest.approx(wanted, abs=1e-12)


def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    truth = set_of(image_of([(0, 0, 50, 50), (50, 50, 90, 90)], [0, 1], [False, False]))
    perfect = found_in([(0, 0, 0.9, (0, 0, 50, 50)), (0, 1, 0.8, (50, 50, 90, 90))])
    assert [each.mean for each in voc_precision(perfect, truth)] == pytest.approx([1.0, 1.0])
    assert [each.mean for each in voc_precision(found_in([]), truth)] == [0.0, 0.0]


def test_difficult_objects_count_neither_as_found_nor_as_missed() -> None:
    truth = set_of(image_of([(0, 0, 50, 50), (50, 50, 90, 90)], [0, 0], [False, True]))
    [each] = voc_precision(found_in([(0, 0, 0.9, (50, 50, 90, 90)), (0, 0, 0.8, (0, 0, 50, 50))]), truth)
    assert each.num_objects == 1
    assert each.mean == pytest.approx(1.0)


def test_the_second_detection_of_an_object_is_wrong() -> None:
    # Precision 1 at recall 1/2, then 1/2, then 2/3 at recall 1: (6 + 5 * 2/3) / 11.
    truth = set_of(image_of([(0, 0, 50, 50), (50, 50, 90, 90)], [0, 0], [False, False]))
    rows = [(0, 0, 0.9, (0, 0, 50, 50)), (0, 0, 0.8, (0, 0, 50, 50)), (0, 0, 0.7, (50, 50, 90, 90))]
    [each] = voc_precision(found_in(rows), truth)
    assert each.at[0] == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_eleven_points_looks_at_recalls_that_are_reached() -> None:
    assert eleven_points(np.array([0.5]), np.array([1.0])) == pytest.approx(6 / 11)
    assert eleven_points(np.array([]), np.array([])) == 0
