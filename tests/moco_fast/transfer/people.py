"""Synthetic set in the layout of COCO's keypoints: triangles that point up, with a keypoint at each corner."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco_fast.transfer.keypoints import COCO_KEYPOINTS
from tests.moco_fast.transfer.coco_shapes import an_object
from tests.moco_fast.transfer.tiny import TINY

# Where each keypoint is in its object's box.
CORNERS = {"top": (0.5, 0.0), "left_foot": (0.0, 1.0), "right_foot": (1.0, 1.0)}
PERSON = {
    name: ({"l": 0.3, "r": 0.7}.get(name[0], 0.5), 0.05 + 0.9 * number / 17)
    for number, name in enumerate(COCO_KEYPOINTS)
}

TINY_KEYPOINTS = replace(
    TINY,
    layout="coco",
    head="fpn",
    train=("train2017",),
    test=("val2017",),
    keypoints=True,
    keypoint_sigmas=(0.1,),
    anchor_sizes=(8, 16, 24, 32, 48),
    test_proposals=(50, 10),
    regions=8,
    batch_size=2,
    steps=2,
    sides=(32,),
    test_side=32,
    longest=48,
    precise_batches=1,
)
"""With narrow heads, as `narrow` makes them."""


def narrow(monkeypatch) -> None:
    """Give heads of keypoints two layers of 16 channels; the real ones take 4 billion products for each region."""
    monkeypatch.setattr("moco_fast.transfer.network._KEYPOINT_LAYERS", (16, 16))


def write_people(folder: Path, parts: dict[str, int], *, places: dict[str, tuple] = CORNERS, seed: int = 0) -> Path:
    """Write `parts` (name -> number of images); each fifth keypoint is hidden, each fifth not marked."""
    rng = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for part, num_images in parts.items():
        (folder / part).mkdir()
        images, objects = [], []
        for image_id in range(100, 100 + num_images):
            width, height = (96, 64) if rng.random() < 0.6 else (64, 96)
            image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
            for left in range(0, width - 31, 32):
                size = int(rng.integers(20, 31))
                x, y = left + int(rng.integers(0, 32 - size + 1)), int(rng.integers(0, height - size + 1))
                corners = [x + size / 2, y, x, y + size - 1, x + size - 1, y + size - 1]
                ImageDraw.Draw(image).polygon(corners, fill=(220, 40, 40))
                objects.append(a_person(len(objects) + 1, image_id, (x, y, size, size), places, rng))
            image.save(folder / part / f"{image_id:012}.jpg", quality=95)
            images.append({"id": image_id, "file_name": f"{image_id:012}.jpg", "height": height, "width": width})
        category = {"id": 1, "name": "person", "keypoints": list(places), "skeleton": [[1, 2], [1, 3]]}
        told = {"images": images, "annotations": objects, "categories": [category]}
        (folder / "annotations" / f"person_keypoints_{part}.json").write_text(json.dumps(told))
    return folder


def a_person(number: int, image_id: int, box: tuple, places: dict[str, tuple], rng) -> dict:
    x, y, size, _ = box
    keypoints: list[int] = []
    for across, down in places.values():
        marked = int(rng.choice([0, 1, 2, 2, 2]))
        pixels = (x + int(across * (size - 1)), y + int(down * (size - 1)), marked)
        keypoints += pixels if marked else (0, 0, 0)
    if not any(keypoints[2::3]):
        keypoints[:3] = [x, y, 2]
    told = an_object(number, image_id, 1, box, [[x, y, x + size, y, x + size, y + size]])
    return told | {
        "keypoints": keypoints,
        "num_keypoints": sum(mark > 0 for mark in keypoints[2::3]),
        "area": size**2 / 2,
    }
