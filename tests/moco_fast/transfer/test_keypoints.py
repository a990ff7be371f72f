import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.transfer.keypoints import COCO_KEYPOINTS, keypoints_of, moved_keypoints


def named(*names: str, **more):
    return keypoints_of([{"name": "cat", "keypoints": list(names)}], where="FILE", **{"sigmas": [0.1]} | more)


def test_the_keypoints_of_coco_have_its_sigmas_and_sides() -> None:
    found = keypoints_of([{"name": "person", "keypoints": list(COCO_KEYPOINTS), "skeleton": [[1, 2]]}], where="FILE")
    # COCO_PERSON_KEYPOINT_FLIP_MAP of detectron2 (data/datasets/builtin_meta.py): every left one with its right one.
    assert found.partners == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    # kpt_oks_sigmas of cocodataset/cocoapi (PythonAPI/pycocotools/cocoeval.py).
    wanted = [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]
    assert found.sigmas == pytest.approx([each / 10 for each in wanted])
    assert found.lines == ((0, 1),)


def test_sides_are_told_by_words_in_whatever_way_they_are_written() -> None:
    found = named("L_Eye", "R_Eye", "nose", "leftEar", "RightEar", "paw left 1", "paw right 1", "R", "upright")
    assert found.partners == (1, 0, 2, 4, 3, 6, 5, 7, 8)
    assert found.is_mirrored
    assert not named("1", "2").is_mirrored


def test_pairs_and_sigmas_that_are_given_come_first() -> None:
    found = named("a", "left", "c", pairs=["a:c"], sigmas=[0.1, 0.2, 0.3])
    assert (found.partners, found.sigmas) == ((2, 1, 0), (0.1, 0.2, 0.3))
    assert named("left", "b", pairs=[]).partners == (0, 1)
    assert named("a", "b", sigmas=[0.5]).sigmas == (0.5, 0.5)


WRONG = {
    "'left_eye' without one on the other side": (("left_eye", "nose"), {}),
    "spelled alike": (("left_eye", "right_eye", "RightEye"), {}),
    "two keypoints of one name": (("a", "a"), {}),
    "how exactly each can be marked is not known: give --keypoint-sigmas": (("a", "b"), {"sigmas": None}),
    "has 3 numbers, and FILE has 2 keypoints": (("a", "b"), {"sigmas": [0.1] * 3}),
    "--keypoint-pairs a: give two keypoints": (("a", "b"), {"pairs": ["a"]}),
    "--keypoint-pairs a:c: give two keypoints": (("a", "b"), {"pairs": ["a:c"]}),
    "a keypoint has one partner": (("a", "b", "c"), {"pairs": ["a:b", "b:c"]}),
    "names no keypoints of its category 'cat'": ((), {}),
}


@pytest.mark.parametrize("reason", WRONG)
def test_keypoints_that_cannot_be_are_refused(reason) -> None:
    names, more = WRONG[reason]
    with pytest.raises(ValueError, match=reason):
        named(*names, **more)


def test_categories_share_one_list() -> None:
    both = [{"name": name, "keypoints": [name]} for name in "ab"]
    with pytest.raises(ValueError, match="categories with other keypoints"):
        keypoints_of(both, where="FILE", sigmas=[1])
    with pytest.raises(ValueError, match="no category"):
        keypoints_of([], where="FILE")


def test_lines_that_cannot_be_read_are_left_out() -> None:
    for skeleton, wanted in (([[1, 2], [2, 9]], ((0, 1),)), ("ab", ()), ([1], ()), (None, ())):
        category = {"name": "cat", "keypoints": ["a", "b"], "skeleton": skeleton}
        assert keypoints_of([category], where="FILE", sigmas=[1]).lines == wanted


@given(st.integers(0, 2**32 - 1))
def test_mirroring_twice_leads_back_and_moves_names_with_places(seed) -> None:
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate([rng.uniform(1, 49, (3, 4, 2)), rng.integers(0, 3, (3, 4, 1))], axis=2)
    keypoints = keypoints.astype(np.float32)
    keypoints[keypoints[..., 2] == 0] = 0
    how = {"width": 50, "is_mirrored": True, "partners": (1, 0, 2, 3)}
    once = moved_keypoints(keypoints, scale=(1.0, 1.0), **how)
    left, right = keypoints[:, 0], once[:, 1]
    np.testing.assert_array_equal(left[:, 1:], right[:, 1:])
    marked = left[:, 2] > 0
    np.testing.assert_allclose(left[marked, 0], 50 - right[marked, 0], atol=1e-5)
    assert not right[~marked].any()
    np.testing.assert_allclose(moved_keypoints(once, scale=(1.0, 1.0), **how), keypoints, atol=1e-5)
    scaled = moved_keypoints(keypoints, scale=(2.0, 0.5), width=100, is_mirrored=False, partners=(0, 1, 2, 3))
    np.testing.assert_allclose(scaled, keypoints * np.array([2, 0.5, 1]))
