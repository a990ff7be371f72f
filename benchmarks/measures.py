"""Our measures of Cityscapes and LVIS beside the benchmarks' own code: whether figures are equal, and what they take.

    uv pip install -r benchmarks/requirements.txt
    python benchmarks/measures.py

Both measure the same synthetic objects and detections, made here; differences above 1e-9 are an error.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from alternating import claims_table, compare, header, write_claims
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from moco_fast.transfer.cityscapes import cityscapes_precision, read_cityscapes
from moco_fast.transfer.coco import encoded_masks, result_rows
from moco_fast.transfer.lvis import lvis_precision, read_lvis
from moco_fast.transfer.metrics import ClassPrecision, Detections
from moco_fast.transfer.sets import DetectionSet

# Names of numpy that the benchmarks' code still uses; neither runs with the numpy of today without them.
for _name, _value in (("in1d", np.isin), ("float", float)):
    if not hasattr(np, _name):
        setattr(np, _name, _value)

_IDS = (24, 25, 26, 27, 28, 31, 32, 33)
Rows = list[tuple[int, int, float, np.ndarray]]


def ellipse(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    across, down = rng.uniform(0.01, 0.1, 2) * width
    return np.hypot((np.arange(width) - x) / across, (np.arange(height)[:, None] - y) / down) < 1


def moved(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))


def as_detections(rows: Rows) -> Detections:
    image, classes, scores, masks = zip(*rows, strict=True)
    runs = [encoded_masks(each[None].astype(np.uint8))[0] for each in masks]
    boxes = np.array([coco_mask.toBbox(each) for each in runs], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        image=np.array(image), boxes=boxes, classes=np.array(classes), scores=np.array(scores, np.float32), masks=runs
    )


def cities(folder: Path, num_images: int, per_image: int) -> tuple[DetectionSet, Detections]:
    rng, rows = np.random.default_rng(0), Rows()
    for number in range(num_images):
        numbers = np.full((1024, 2048), 7, np.uint16)
        numbers[900:] = 1
        there = []
        for place in range(20):
            label = int(rng.integers(8))
            there.append((label, ellipse(rng, 1024, 2048)))
            numbers[there[-1][1]] = _IDS[label] if place % 5 == 0 else 1000 * _IDS[label] + place
        for kind, ending, pixels in (
            ("leftImg8bit", "leftImg8bit", np.zeros((1024, 2048), np.uint8)),
            ("gtFine", "gtFine_instanceIds", numbers),
        ):
            place = folder / kind / "val" / "town"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"town_{number:06}_000019_{ending}.png", compress_level=1)
        for _ in range(per_image):
            label, mask = there[int(rng.integers(len(there)))]
            rows.append((number, label, float(rng.random()), moved(rng, mask)))
    return read_cityscapes([str(folder)], ["val"], option="--test"), as_detections(rows)


def theirs_of_cities(folder: Path, found: Detections, data: DetectionSet) -> dict[str, float]:
    own = import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    assert found.masks is not None
    predicted, truth = [], []
    for number, image in enumerate(data.images):
        name = image.path.name.removesuffix("_leftImg8bit.png")
        lines = []
        for row in np.flatnonzero(found.image == number).tolist():
            file = folder / f"{name}_{row}.png"
            Image.fromarray(coco_mask.decode(dict(found.masks[row])) * 255).save(file, compress_level=1)
            lines.append(f"{file.name} {_IDS[found.classes[row]]} {float(found.scores[row])}\n")
        predicted.append(str(folder / f"{name}.txt"))
        Path(predicted[-1]).write_text("".join(lines))
        truth.append(str(image.path).replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_instanceIds.png"))
    own.args.predictionPath, own.args.gtInstancesFile = str(folder), str(folder / "instances.json")
    own.args.quiet, own.args.JSONOutput = True, False
    own.writeDict2JSON = lambda *_: None  # Of what it matched; it fails with the numbers of today's numpy.
    classes = own.evaluateImgLists(predicted, truth, own.args)["averages"]["classes"]
    return {f"mask {name}": float(each["ap"]) for name, each in classes.items() if not np.isnan(each["ap"])}


def long_tail(folder: Path, num_images: int, per_image: int) -> tuple[DetectionSet, Detections]:
    rng, rows, objects, images = np.random.default_rng(0), Rows(), [], []
    (folder / "val2017").mkdir()
    for number in range(num_images):
        name = f"{number:012}.jpg"
        Image.new("L", (160, 120)).save(folder / "val2017" / name)
        classes = rng.choice(1_230, 18, replace=False).tolist()
        there = [(label, ellipse(rng, 120, 160)) for label in classes[:12]]
        there = [(label, mask) for label, mask in there if mask.any()]
        for label, mask in there:
            runs = encoded_masks(mask[None].astype(np.uint8))[0]
            counts = runs["counts"] if isinstance(runs["counts"], str) else runs["counts"].decode()
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "segmentation": {"size": runs["size"], "counts": counts},
                    "bbox": [float(each) for each in coco_mask.toBbox(runs)],
                    "area": float(mask.sum()),
                }
            )
        told = {"id": number, "coco_url": f"http://images.cocodataset.org/val2017/{name}", "height": 120, "width": 160}
        negative, open_ones = [label + 1 for label in classes[12:]], [classes[0] + 1]
        images.append(told | {"neg_category_ids": negative, "not_exhaustive_category_ids": open_ones})
        for _ in range(per_image):
            label, mask = there[int(rng.integers(len(there)))]
            label = label if rng.random() < 0.3 else int(rng.choice(classes if rng.random() < 0.3 else 1_230))
            rows.append((number, label, float(rng.random()), moved(rng, mask)))
    categories = [{"id": label + 1, "name": f"class {label}", "frequency": "rcf"[label % 3]} for label in range(1_230)]
    told = {"images": images, "annotations": objects, "categories": categories}
    (folder / "lvis_val.json").write_text(json.dumps(told))
    return read_lvis([str(folder)], ["lvis_val"], option="--test"), as_detections(rows)


def theirs_of_long_tail(folder: Path, found: Detections, data: DetectionSet) -> dict[str, float]:
    from lvis import LVIS, LVISEval, LVISResults

    truth, means = LVIS(str(folder / "lvis_val.json")), {}
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        rows = result_rows(found, data, name)
        measure = LVISEval(truth, LVISResults(truth, rows), name)
        measure.evaluate()
        measure.accumulate()
        of_classes = measure.eval["precision"][:, :, :, 0].mean(axis=(0, 1)).tolist()
        means |= {f"{kind} {each}": mean for each, mean in zip(data.class_names, of_classes, strict=True) if mean > -1}
    return means


Measure = Callable[[Detections, DetectionSet], Mapping[str, Sequence[ClassPrecision]]]


def means_of(measure: Measure, found: Detections, data: DetectionSet) -> dict[str, float]:
    return {f"{kind} {each.name}": each.mean for kind, of_kind in measure(found, data).items() for each in of_kind}


def timed(call: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cityscapes", type=int, default=4, help="images, each with 100 detections")
    parser.add_argument("--lvis", type=int, default=200, help="images, each with 300 detections")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    claims = []
    for name, number, per_image, made, measure, theirs in (
        ("Cityscapes", options.cityscapes, 100, cities, cityscapes_precision, theirs_of_cities),
        ("LVIS", options.lvis, 300, long_tail, lvis_precision, theirs_of_long_tail),
    ):
        with TemporaryDirectory() as folder:
            data, found = made(Path(folder), number, per_image)
            ours, own_s = timed(partial(means_of, measure, found, data))
            official, their_s = timed(partial(theirs, Path(folder), found, data))
        apart = max(abs(ours[each] - official[each]) for each in official)
        if ours.keys() != official.keys() or apart > 1e-9:
            sys.exit(f"{name}: figures are up to {apart:g} apart, of {len(ours)} and {len(official)}")
        print(f"{name}: {len(ours)} APs of classes, mean {np.mean(list(ours.values())):.4f}, at most {apart:.1g} apart")
        title = f"measure of {name}, {number} images with {per_image} detections each, against its benchmark's code"
        claims.append(compare(title, [own_s], [their_s], unit="s", less_is_better=True))
    print(f"{header()}\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
