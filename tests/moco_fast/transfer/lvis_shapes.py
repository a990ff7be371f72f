"""Synthetic set in the layout of LVIS: the shapes of COCO's, with classes that are looked at in some images alone."""

import json
from pathlib import Path

import numpy as np

from tests.moco_fast.transfer.coco_shapes import COLORS, write_coco

FREQUENCIES = {7: "r", 11: "c", 30: "f"}


def write_lvis(folder: Path, parts: dict[str, int], *, seed: int = 0, version: str = "v0.5") -> Path:
    """Write `parts` (train or val -> number of images): images as of COCO, files as of a version of LVIS."""
    write_coco(folder, {f"{part}2017": number for part, number in parts.items()}, seed=seed)
    rng = np.random.default_rng(seed)
    for part in parts:
        path = folder / "annotations" / f"instances_{part}2017.json"
        told = json.loads(path.read_text())
        path.unlink()
        for image in told["images"]:
            there = {each["category_id"] for each in told["annotations"] if each["image_id"] == image["id"]}
            image["neg_category_ids"] = [each for each in COLORS if each not in there and rng.random() < 0.5]
            image["not_exhaustive_category_ids"] = [each for each in there if rng.random() < 0.3]
            name = image.pop("file_name")
            if version == "v0.5":
                image["file_name"] = f"COCO_{part}2014_{name}"
            image["coco_url"] = f"http://images.cocodataset.org/{part}2017/{name}"
        for each in told["annotations"]:
            del each["iscrowd"]
        for each in told["categories"]:
            each["frequency"] = FREQUENCIES[each["id"]]
        (folder / f"lvis_{version}_{part}.json").write_text(json.dumps(told))
    return folder
