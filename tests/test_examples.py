"""Every script of examples/ does what its docstring says."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import shards
from tests.warm import WarmPython

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ of random pixels, and shards/ of them."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(160):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 64)).save(folder / "images" / f"{number:03}.jpg")
    shards.pack(shards.PackConfig(sources=(str(folder / "images"),), out=str(folder / "shards"), workers=1))
    return folder


Run = Callable[..., str]


@pytest.fixture
def run(packed: Path, warm_python: WarmPython) -> Run:
    return partial(run_example, warm_python, packed)


def run_example(python: WarmPython, folder: Path, name: str, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = python.run(EXAMPLES / name, *words, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if f'"{path.name}"' not in here] == []


def test_a_plain_loop_learns(run: Run) -> None:
    printed = run("plain_loop.py", "shards", "8").splitlines()
    assert len(printed) == 5  # an epoch of 160 samples has five steps of 32
    assert printed[0].startswith("step 0: loss ")


@pytest.mark.slow
def test_lightning_takes_the_loader(run: Run) -> None:
    assert "after 5 steps" in run("with_lightning.py", "shards", "5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom_encoder.py", "custom_views.py"])
def test_a_custom_part_trains_and_embeds(name: str, packed: Path, run: Run) -> None:
    run(name, "shards", f"run-{name}", "2")
    assert (packed / f"run-{name}" / "outcome.json").read_text().count('"finished"') == 1
    if name == "custom_views.py":
        printed = run("embed_folder.py", f"run-{name}", "images")
        assert "160 images, 256 numbers each; 0 could not be read" in printed
        assert len(printed.splitlines()) == 7


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "JPEG")
    return buffer.getvalue()


def write_npz(path: Path) -> None:
    # As MedMNIST: several parts of the same length, labels in columns.
    arrays = {"train_images": PIXELS[:3], "val_images": PIXELS[3:], "train_labels": LABELS[:3, None]}
    np.savez(path, val_labels=LABELS[3:, None], **arrays)


def write_mat(path: Path) -> None:
    savemat(path, {"X": PIXELS.transpose(1, 2, 3, 0), "y": LABELS[:, None]})


def write_pickle(path: Path) -> None:
    batch = {"data": PIXELS.transpose(0, 3, 1, 2).reshape(6, -1), "fine_labels": LABELS, "coarse_labels": LABELS * 0}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def write_pt(path: Path) -> None:
    import torch

    torch.save((torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)), path)


def write_idx(path: Path) -> None:
    gray = PIXELS[..., 0]
    path.write_bytes(gzip.compress(b"\0\0\x08\3" + np.array(gray.shape, ">u4").tobytes() + gray.tobytes()))
    data = b"\0\0\x08\1\0\0\0\6" + LABELS.astype(np.uint8).tobytes()
    path.with_name("train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))


def write_rec(path: Path) -> None:
    """As MXNet's im2rec does: dmlc/recordio.h, and pack() of mxnet/recordio.py."""
    mark, parts = 0xCED7230A, b""
    for number, label in enumerate(LABELS):
        data = struct.pack("<IfQQ", 0, label, number, 0) + jpeg(number) + (struct.pack("<I", mark) + b"x" * 5)
        first, _, second = data.partition(struct.pack("<I", mark))
        for part, piece in ((1, first), (3, second)):
            parts += struct.pack("<II", mark, part << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
    path.write_bytes(parts)


def write_litdata(path: Path) -> None:
    """As LitData 0.2.76 does: litdata/streaming/writer.py."""
    path.mkdir()
    items = [
        struct.pack("<II", len(jpeg(i)), 8) + jpeg(i) + int(label).to_bytes(8, "little")
        for i, label in enumerate(LABELS)
    ]
    offsets = 4 * (len(items) + 2) + np.cumsum([0, *map(len, items)])
    data = np.uint32(len(items)).tobytes() + offsets.astype("<u4").tobytes() + b"".join(items)
    (path / "chunk-0-0.bin").write_bytes(data)
    config = {"data_format": ["jpeg", "int"], "compression": None}
    (path / "index.json").write_text(json.dumps({"chunks": [{"filename": "chunk-0-0.bin"}], "config": config}))


CONTAINERS = {
    "x.npz": (write_npz, "NumPy's .npz"),
    "x.npy": (lambda path: np.save(path, PIXELS), "NumPy's .npy"),
    "x.mat": (write_mat, "MATLAB"),
    "data_batch_1": (write_pickle, "a pickle"),
    "x.pt": (write_pt, "a file of PyTorch"),
    "train-images-idx3-ubyte.gz": (write_idx, "gzip"),
    "x.rec": (write_rec, "MXNet's RecordIO"),
    "litdata": (write_litdata, "LitData"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_other_containers_are_refused_by_name_and_packed_by_way_of_a_tar(name: str, tmp_path: Path, run: Run) -> None:
    write, called = CONTAINERS[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"is ({called}|MNIST's IDX), which is not read.*Other containers"):
        shards.pack(shards.PackConfig(sources=(str(tmp_path / name),), out=str(tmp_path / "none")))
    assert run("to_tar.py", str(tmp_path / name), str(tmp_path / "out.tar")).endswith("out.tar: 6 samples\n")
    config = shards.PackConfig(sources=(str(tmp_path / "out.tar"),), out=str(tmp_path / "out"), quality=100, workers=1)
    manifest = (shards.pack(config) or {})[""]
    assert (manifest.num_samples, manifest.class_names) == (6, () if name == "x.npy" else ("0", "1", "2"))
    packed = shards.open(str(tmp_path / "out"))
    sources = (tmp_path / "out" / "shard-000000.sources.txt").read_text().splitlines()
    for record, source in zip(packed.index(0), sources, strict=True):
        number = int(source.rpartition("/")[2].partition(".")[0]) - 1
        assert record["label"] == (-1 if name == "x.npy" else LABELS[number])
        shard = (tmp_path / "out" / "shard-000000.tar").read_bytes()
        with Image.open(io.BytesIO(shard[record["offset"] : record["offset"] + record["size"]])) as image:
            # Colors are halved in resolution, so the mean alone stays close.
            expected = PIXELS[number, ..., 0] if image.mode == "L" else PIXELS[number]
            assert abs(np.asarray(image).mean() - expected.mean()) < 2


def cls_of(tar_path: Path) -> list[str]:
    with tarfile.open(tar_path) as tar:
        return [(tar.extractfile(each) or io.BytesIO()).read().decode() for each in tar if each.name.endswith(".cls")]


def test_labels_of_each_part_are_its_own_whatever_the_order(tmp_path: Path, run: Run) -> None:
    images, labels = {"x_train": PIXELS, "x_test": PIXELS}, {"y_train": LABELS, "y_test": 2 - LABELS}
    np.savez(tmp_path / "keras.npz", **images, ids=np.arange(6) + 100, **labels)
    printed = run("to_tar.py", str(tmp_path / "keras.npz"), str(tmp_path / "out.tar"))
    assert "x_test (6, 32, 32, 3): labels of y_test" in printed
    assert cls_of(tmp_path / "out.tar") == [str(label) for label in (*LABELS, *(2 - LABELS))]


@pytest.mark.parametrize("labels", [LABELS.astype(np.float64), np.array(["0", "1", "2"])[LABELS]])
def test_labels_of_arrays_may_be_whole_floats_or_names(labels: np.ndarray, tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=labels)
    run("to_tar.py", str(tmp_path / "x.npz"), str(tmp_path / "out.tar"))
    assert cls_of(tmp_path / "out.tar") == [str(label) for label in LABELS]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": PIXELS, "z": PIXELS / np.float32(255)}, "z (6, 32, 32, 3) holds float32, not bytes"),
        ({"x": PIXELS[0]}, "x (32, 32, 3) is one image, or 32 gray ones"),
        ({"x": PIXELS, "a": LABELS, "b": LABELS}, "a or b may be the labels of x"),
        ({"x": PIXELS, "y": LABELS + 0.5}, "holds fractions"),
        ({"y": LABELS}, "has no array of images"),
    ],
)
def test_images_that_are_not_taken_leave_no_tar(
    arrays: dict[str, np.ndarray], said: str, tmp_path: Path, warm_python: WarmPython
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    done = warm_python.run(EXAMPLES / "to_tar.py", str(tmp_path / "x.npz"), "out.tar", cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
