"""The usual data sets' own files, tiny: what their publishers' archives hold, with made-up pictures."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.shards.pictures import jpeg


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


# The devkit's numbers are in another order than WordNet ids, and inner nodes of the tree follow the leaves.
SYNSETS = [(1, "n02119789", 0), (2, "n01440764", 0), (3, "n03000684", 0), (4, "n00001740", 3)]
WNIDS = sorted(wnid for _, wnid, children in SYNSETS if not children)


def devkit_files(truth: list[int]) -> dict[str, bytes]:
    """Files of ILSVRC2012_devkit_t12: ground truth as ILSVRC2012_IDs."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    dtype = [(name, object) for name in (*fields, "num_train_images")]
    rows = [(i, wnid, "some, words", "a gloss", n, np.zeros(n), 0, 7) for i, wnid, n in SYNSETS]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})
    top = "ILSVRC2012_devkit_t12"
    return {
        f"{top}/readme.txt": b"about",
        f"{top}/data/meta.mat": buffer.getvalue(),
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }


def write_imagenet(folder: Path, *, per_class: int = 3, truth: tuple[int, ...] = (3, 1, 2, 3)) -> None:
    """The two tars and the devkit. Image i of class c is jpeg(100 * c + i), validation image v is jpeg(1000 + v)."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(100 * c + i) for i in range(per_class)})
        for c, wnid in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    val = {f"ILSVRC2012_val_{v + 1:08d}.JPEG": jpeg(1000 + v) for v in range(len(truth))}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(devkit_files(list(truth)), "w:gz"))


def cifar_pixels(seed: int, count: int) -> np.ndarray:
    """(count, 32, 32, 3): smooth pictures, so that JPEG keeps them close to what they were."""
    coarse = np.random.default_rng(seed).integers(40, 216, (count, 2, 2, 3)).astype(np.float64)
    ramp = np.linspace(0, 1, 32)
    rows = coarse[:, :1] * (1 - ramp[None, :, None, None]) + coarse[:, 1:] * ramp[None, :, None, None]
    return np.rint(
        rows[:, :, :1] * (1 - ramp[None, None, :, None]) + rows[:, :, 1:] * ramp[None, None, :, None]
    ).astype(np.uint8)


CIFAR_NAMES = {
    10: ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    100: [f"class_{i:02d}" for i in range(100)],
}


def cifar_files(classes: int, form: str, per_batch: int = 4) -> tuple[dict[str, bytes], dict[str, list[int]]]:
    """Files of a form, `python` or `binary`, and each batch's labels; the seed of its pixels is its number."""
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    files: dict[str, bytes] = {}
    labels: dict[str, list[int]] = {}
    for seed, name in enumerate(batches):
        labels[name] = np.random.default_rng(seed).integers(0, classes, per_batch).tolist()
        planes = cifar_pixels(seed, per_batch).transpose(0, 3, 1, 2).reshape(per_batch, -1)
        if form == "python":
            key = "labels" if classes == 10 else "fine_labels"
            # Keys and texts are bytes, as Python 3 sees what Python 2 wrote.
            batch = {b"batch_label": b"a batch", key.encode(): labels[name], b"data": planes, b"filenames": [b"x.png"]}
            files[name] = pickle.dumps(batch, protocol=2)
        else:
            coarse = [bytes([9])] * per_batch if classes == 100 else [b""] * per_batch
            records = zip(coarse, labels[name], planes, strict=True)
            files[f"{name}.bin"] = b"".join(c + bytes([label]) + row.tobytes() for c, label, row in records)
    names = CIFAR_NAMES[classes]
    if form == "python":
        key = "label_names" if classes == 10 else "fine_label_names"
        files["batches.meta" if classes == 10 else "meta"] = pickle.dumps({key: names}, protocol=2)
    else:
        files["batches.meta.txt" if classes == 10 else "fine_label_names.txt"] = "\n".join([*names, ""]).encode()
    return files, labels


CIFAR_FOLDERS = {
    (10, "python"): "cifar-10-batches-py",
    (10, "binary"): "cifar-10-batches-bin",
    (100, "python"): "cifar-100-python",
    (100, "binary"): "cifar-100-binary",
}

VOC_CLASSES = ["aeroplane", "cat", "person"]


def voc_files(
    parts: dict[str, list[str]], signs: dict[str, tuple[int, int, int]], year: str = "VOC2007"
) -> dict[str, bytes]:
    """Files of a devkit: names of each part's images; 1, 0 or -1 of each image for every class."""
    top = f"VOCdevkit/{year}"
    files = {f"{top}/ImageSets/Layout/trainval.txt": b"000001\n"}
    for part, names in parts.items():
        files[f"{top}/ImageSets/Main/{part}.txt"] = "".join(f"{name}\n" for name in names).encode()
        for column, class_name in enumerate(VOC_CLASSES):
            lines = "".join(f"{name} {signs[name][column]:2d}\n" for name in names)
            files[f"{top}/ImageSets/Main/{class_name}_{part}.txt"] = lines.encode()
    for number, name in enumerate(sorted(signs)):
        files[f"{top}/JPEGImages/{name}.jpg"] = jpeg(number)
        files[f"{top}/Annotations/{name}.xml"] = b"<annotation><object><name>cat</name></object></annotation>"
        files[f"{top}/SegmentationObject/{name}.png"] = b"a mask"
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_coco(
    folder: Path,
    labels: dict[str, list[int]],
    categories: dict[int, str],
    *,
    images: str = "",
    name: str = "train.json",
) -> Path:
    """A JSON file, and the images that it names: number n in its order is jpeg(n)."""
    listed, annotations = [], []
    for number, (file_name, of_image) in enumerate(labels.items()):
        listed.append({"id": 1000 + number, "file_name": file_name, "width": 48, "height": 40})
        annotations += [
            {"id": len(annotations) + i, "image_id": 1000 + number, "category_id": c} for i, c in enumerate(of_image)
        ]
        path = folder / images / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    values = {"info": {}, "images": listed, "annotations": annotations}
    values["categories"] = [{"id": number, "name": each, "supercategory": "x"} for number, each in categories.items()]
    (folder / name).write_text(json.dumps(values))
    return folder / name
