"""Keypoints of objects: names, partners in a mirror, and the sigmas of OKS. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["COCO_KEYPOINTS", "Keypoints", "keypoints_of", "moved_keypoints"]

# cocoeval.py of cocodataset/cocoapi (PythonAPI), of the 17 keypoints of a person.
_COCO_SIGMAS = {
    "nose": 0.026,
    "left_eye": 0.025,
    "right_eye": 0.025,
    "left_ear": 0.035,
    "right_ear": 0.035,
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
}
COCO_KEYPOINTS = tuple(_COCO_SIGMAS)
"""Names of a person's keypoints, in the order of COCO's file."""

_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_EXAMPLE = "--keypoint-pairs left_eye:right_eye left_ear:right_ear"


@dataclass(frozen=True, kw_only=True)
class Keypoints:
    """The keypoints that every object of a set has, in the order of its file."""

    names: tuple[str, ...]
    partners: tuple[int, ...]
    """For each the number of the one that takes its place in a mirrored image; its own if it has no other side."""
    sigmas: tuple[float, ...]
    """For each how far annotators are apart, relative to an object's size (OKS)."""
    lines: tuple[tuple[int, int], ...] = ()
    """Numbers of keypoints that are connected where they are drawn."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_mirrored(self) -> bool:
        """Whether some change places in a mirrored image."""
        return self.partners != tuple(range(len(self)))


def keypoints_of(
    categories: Sequence[Mapping[str, Any]],
    *,
    where: str,
    pairs: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Keypoints:
    """Return the keypoints that the categories of a file in COCO's form name.

    Args:
        categories: with `keypoints` (names) and perhaps `skeleton` (pairs of numbers, from 1).
        where: the file, for errors.
        pairs: `left:right` names that change places in a mirror; None: by the words left and right, or L and R.
        sigmas: one for each, or one for all; None: COCO's, if the keypoints are.

    Raises:
        ValueError: there are none, they differ between categories, or pairs or sigmas do not fit.
    """
    names = _names(categories, where)
    if sigmas is None and names != COCO_KEYPOINTS:
        raise ValueError(
            f"{where} has {len(names)} keypoints that are not COCO's ({_some(names)}), and how exactly each can be "
            "marked is not known: give --keypoint-sigmas, one for all of them or one for each in this order (COCO's "
            "are 0.025 for an eye to 0.107 for a hip)"
        )
    sigmas = tuple(_COCO_SIGMAS.values()) if sigmas is None else tuple(sigmas)
    if len(sigmas) not in (1, len(names)):
        raise ValueError(
            f"--keypoint-sigmas has {len(sigmas)} numbers, and {where} has {len(names)} keypoints: give one for all of "
            "them or one for each"
        )
    return Keypoints(
        names=names,
        partners=_partners_by_name(names, where) if pairs is None else _partners_of_pairs(names, pairs, where),
        sigmas=sigmas * (len(names) if len(sigmas) == 1 else 1),
        lines=_lines(categories[0].get("skeleton"), len(names)),
    )


def moved_keypoints(
    keypoints: npt.NDArray[np.float32],
    *,
    scale: tuple[float, float],
    width: int,
    is_mirrored: bool,
    partners: Sequence[int],
) -> npt.NDArray[np.float32]:
    """Return keypoints in an image that was resized and perhaps mirrored.

    Args:
        keypoints: (N, K, 3) x, y and visibility; what is not marked (0) stays at 0, 0.
        scale: what x and y are multiplied with.
        width: of the resized image.
        is_mirrored: whether left and right change sides, and with them the keypoints' names.
        partners: as of `Keypoints`.
    """
    moved = keypoints * np.array((*scale, 1.0), dtype=np.float32)
    if is_mirrored:
        moved = moved[:, list(partners)]
        moved[..., 0] = width - moved[..., 0]
    moved[moved[..., 2] == 0] = 0
    return moved


def _names(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    of_each: list[tuple[str, ...]] = []
    for category in categories:
        told = category.get("keypoints")
        if not isinstance(told, list) or not told:
            raise ValueError(
                f"{where} names no keypoints of its category {category.get('name')!r}: give it `keypoints`, a list of "
                "their names, or leave the category out"
            )
        of_each.append(tuple(map(str, told)))  # pyright: ignore[reportUnknownArgumentType] - of JSON
    if not of_each:
        raise ValueError(f"{where} has no category, so it has no keypoints: add one that names them")
    if len(set(of_each)) > 1:
        raise ValueError(
            f"{where} has categories with other keypoints than each other, and a network has one list for all: make a "
            "file for each list"
        )
    if len(set(of_each[0])) < len(of_each[0]):
        raise ValueError(f"{where} has two keypoints of one name ({_some(of_each[0])}): give each its own")
    return of_each[0]


def _partners_by_name(names: tuple[str, ...], where: str) -> tuple[int, ...]:
    words = [tuple(map(str.lower, _WORDS.findall(name))) for name in names]
    partners = list(range(len(names)))
    for number, own in enumerate(words):
        other = tuple(_OTHER_SIDE.get(word, word) for word in own)
        if other in words:
            partners[number] = words.index(other)
        elif {"left", "right"} & set(own):
            raise ValueError(
                f"{where} has a keypoint {names[number]!r} without one on the other side, so a mirrored image would "
                f"have it on the wrong one: give all pairs, such as {_EXAMPLE}, or --keypoint-pairs alone if no two "
                "change places"
            )
    if any(partners[other] != number for number, other in enumerate(partners)):
        raise ValueError(f"{where} has keypoints that are one when spelled alike: give all pairs, such as {_EXAMPLE}")
    return tuple(partners)


def _partners_of_pairs(names: tuple[str, ...], pairs: Sequence[str], where: str) -> tuple[int, ...]:
    partners = list(range(len(names)))
    for pair in pairs:
        both = pair.split(":")
        if len(both) != 2 or not set(both) <= set(names):
            raise ValueError(
                f"--keypoint-pairs {pair}: give two keypoints of {where} with a colon between them, such as {_EXAMPLE} "
                f"(it has {_some(names)})"
            )
        one, other = map(names.index, both)
        if one == other or partners[one] != one or partners[other] != other:
            raise ValueError(f"--keypoint-pairs {pair}: a keypoint has one partner: name each in one pair")
        partners[one], partners[other] = other, one
    return tuple(partners)


def _lines(skeleton: Any, num_keypoints: int) -> tuple[tuple[int, int], ...]:
    """Return the lines of a skeleton; they are only drawn, so what cannot be read is left out."""
    try:
        lines = [(int(one) - 1, int(other) - 1) for one, other in skeleton or ()]
    except (TypeError, ValueError):
        return ()
    return tuple(line for line in lines if all(0 <= end < num_keypoints for end in line))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
