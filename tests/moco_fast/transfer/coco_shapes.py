"""Synthetic set in COCO's layout: colored shapes with polygons, boxes and a crowd."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {7: ("bus", (220, 40, 40)), 11: ("car", (40, 200, 60)), 30: ("cat", (50, 80, 230))}


def write_coco(folder: Path, parts: dict[str, int], *, seed: int = 0) -> Path:
    """Write `parts` (name -> number of images); triangles and boxes of each category's own color."""
    rng = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for part, num_images in parts.items():
        (folder / part).mkdir()
        images, objects = [], []
        for number in range(num_images):
            image_id = 100 + number
            width, height = (96, 64) if rng.random() < 0.6 else (64, 96)
            image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
            for left in range(0, width - 31, 32):
                category, size = list(COLORS)[rng.integers(3)], int(rng.integers(20, 31))
                x, y = left + int(rng.integers(0, 32 - size + 1)), int(rng.integers(0, height - size + 1))
                corners = [x, y, x + size, y, x + size, y + size, x, y + size]
                if rng.random() < 0.5:
                    corners = corners[:6]
                ImageDraw.Draw(image).polygon(corners, fill=COLORS[category][1])
                objects.append(an_object(len(objects) + 1, image_id, category, (x, y, size, size), [corners]))
            image.save(folder / part / f"{image_id:012}.jpg", quality=95)
            images.append({"id": image_id, "file_name": f"{image_id:012}.jpg", "height": height, "width": width})
        categories = [{"id": category, "name": name} for category, (name, _) in COLORS.items()]
        told = {"images": images, "annotations": objects, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(told))
    return folder


def an_object(number, image_id, category, box, outline, *, crowd: int = 0) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": list(box),
        "segmentation": outline,
        "area": box[2] * box[3],
        "iscrowd": crowd,
    }
