"""Write what make-shards does not read as a tar that it does: images and, where there are some, labels.

python examples/to_tar.py FILE OUT.tar
make-shards pack OUT.tar --out packed

FILE: .npz, .npy, .mat, .h5 or .pt with arrays (N, H, W[, 3]) of bytes and of N labels; a batch of CIFAR's; MNIST's IDX;
LMDB or HDF5 of encoded images; MXNet's .rec; a folder of LitData's chunks. LMDB needs `pip install lmdb`, HDF5 h5py.
"""

import gzip
import io
import json
import pickle
import re
import struct
import sys
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.images.sniff import SNIFFED_BYTES, container, is_image

Samples = Iterator[tuple[Any, Any]]
"""(an encoded image or pixels, label or None)"""


LABELS = frozenset(["label", "labels", "y", "target", "targets", "cls", "class", "classes"])
"""Words in the names of arrays of labels."""


class PlainPickle(pickle.Unpickler):
    """Arrays, texts and numbers alone: any other pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")) and (
            not module.endswith("core.multiarray") or name != "_reconstruct"
        ):
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def words(name: str) -> set[str]:
    """Words of an array's name, in lower case: x, test of x_test; test, x of testX."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)}


def labels_of(name: str, number: int, found: dict[str, Any]) -> tuple[str, list[Any]]:
    """The array of as many labels whose name is most like that of the images, and its values."""
    values = {other: array.ravel() for other, array in found.items() if array.size == number and array.ndim <= 2}
    values = {other: array for other, array in values.items() if array.dtype.kind in "iufUS" and other != name}

    def likeness(other: str) -> tuple[int, bool, bool]:
        called = words(other)
        return len(called & words(name)), not LABELS.isdisjoint(called), "fine" in called

    alike = sorted(values, key=likeness, reverse=True)
    if len(alike) > 1 and likeness(alike[0]) == likeness(alike[1]):
        raise SystemExit(f"{alike[0]} or {alike[1]} may be the labels of {name}: leave one of them out of the file")
    if not alike:
        return "", [None] * number
    labels = values[alike[0]]
    if labels.dtype.kind == "f":
        if not (labels == labels.round()).all():
            raise SystemExit(f"{alike[0]} would be the labels of {name}, but holds fractions: leave it out of the file")
        labels = labels.astype(np.int64)
    return alike[0], labels.tolist()


def of_arrays(arrays: dict[Any, Any]) -> Samples:
    """Images of every array of pixels, with their labels. What else looks like images is refused: it would be lost."""
    found = {str(name): np.asarray(array) for name, array in arrays.items() if not str(name).startswith("__")}
    for name, array in found.items():
        if array.ndim == 2 and array.shape[1] == 3072:  # CIFAR's
            array = array.reshape(-1, 3, 32, 32)
        if array.ndim not in (3, 4) or array.dtype.kind not in "buif":
            continue
        if array.dtype != np.uint8:
            raise SystemExit(
                f"{name} {array.shape} holds {array.dtype}, not bytes: its images would be lost. Save it as uint8, "
                "such as (array * 255).round().astype('uint8') where values are 0 to 1, or leave it out of the file"
            )
        if array.ndim == 3 and array.shape[2] in (3, 4):
            raise SystemExit(
                f"{name} {array.shape} is one image, or {array.shape[0]} gray ones: save it as (N, H, W, C)"
            )
        if array.ndim == 4 and array.shape[2] in (1, 3):  # (H, W, C, N), as MATLAB has them
            array = np.moveaxis(array, 3, 0)
        if array.ndim == 4 and array.shape[1] in (1, 3):  # (N, C, H, W)
            array = np.moveaxis(array, 1, 3)
        pixels = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
        labels, values = labels_of(name, len(pixels), found)
        print(f"{name or 'array'} {array.shape}: {'labels of ' + labels if labels else 'no labels'}")
        yield from zip(pixels, values, strict=True)


def holds_image(value: Any) -> bool:
    return isinstance(value, bytes | np.ndarray) and is_image(bytes(value)[:SNIFFED_BYTES])


def of_hdf5(path: Path) -> Samples:
    import h5py

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    arrays: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(keep)
    yield from of_arrays(arrays)
    found = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in found.items():
        if array.dtype == object and any(map(holds_image, array.flat)):
            labels, values = labels_of(name, array.size, found)
            print(f"{name} {array.shape}: {'labels of ' + labels if labels else 'no labels'}")
            yield from ((bytes(value), label) for value, label in zip(array.flat, values, strict=True))


def of_lmdb(path: Path) -> Samples:
    import lmdb

    with lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir()) as environment:
        yield from ((bytes(value), None) for _, value in environment.begin().cursor())


def of_recordio(path: Path) -> Samples:
    """Records of `im2rec`: flag, label and two numbers, then labels if there are several, then the image."""
    data, at, whole = path.read_bytes(), 0, b""
    while at < len(data):
        magic, word = struct.unpack_from("<II", data, at)
        part, size = word >> 29, word & 0x1FFFFFFF
        # The image held the mark by chance, where a record has several parts.
        whole += (struct.pack("<I", magic) if part in (2, 3) else b"") + data[at + 8 : at + 8 + size]
        at += 8 + size + -size % 4
        if part in (0, 3):
            flag, label = struct.unpack_from("<If", whole)
            yield whole[24 + 4 * flag :], int(label) if not flag else None
            whole = b""


def of_litdata(folder: Path) -> Samples:
    index = json.loads((folder / "index.json").read_text())
    formats = index["config"]["data_format"]
    for chunk in index["chunks"]:
        data = (folder / chunk["filename"]).read_bytes()
        offsets = np.frombuffer(data, "<u4", int.from_bytes(data[:4], "little") + 1, 4).tolist()
        for start, stop in pairwise(offsets):
            sizes = np.frombuffer(data, "<u4", len(formats), start)
            ends = (start + 4 * len(formats) + np.cumsum([0, *sizes])).tolist()
            parts = [data[begin:end] for begin, end in pairwise(ends)]
            assert ends[-1] == stop, f"{chunk['filename']} is damaged"
            label = next(
                (int.from_bytes(p, "little") for p, kind in zip(parts, formats, strict=True) if kind == "int"), None
            )
            yield next(part for part in parts if is_image(part[:64])), label


def of_idx(path: Path) -> Samples:
    def read(path: Path) -> Any:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    return of_arrays({"images": read(path)} | ({"labels": read(labels)} if labels != path and labels.exists() else {}))


def named(held: Any) -> dict[Any, Any]:
    """Arrays by name, out of a dictionary, a tuple such as (images, labels), or an array alone."""
    return held if isinstance(held, dict) else dict(enumerate(held)) if isinstance(held, tuple) else {"": held}


def samples_of(path: Path) -> Samples:
    if (path / "index.json").is_file():
        return of_litdata(path)
    with (gzip.open if path.suffix == ".gz" else open)(path / "data.mdb" if path.is_dir() else path, "rb") as file:
        kind = container(file.read(SNIFFED_BYTES))
    if kind == "a pickle":
        return of_arrays(named(PlainPickle(path.open("rb"), encoding="latin1").load()))
    if kind == "MATLAB":
        from scipy.io import loadmat

        return of_arrays(loadmat(path))
    if kind == "a file of PyTorch":
        import torch

        held = torch.load(path, weights_only=True)
        return of_arrays(named(held))
    readers = {"HDF5": of_hdf5, "LMDB": of_lmdb, "MXNet's RecordIO": of_recordio, "MNIST's IDX": of_idx}
    if kind in readers:
        return readers[kind](path)
    held = np.load(path)
    return of_arrays(dict(held) if isinstance(held, np.lib.npyio.NpzFile) else {"": held})


def main(path: str, out: str) -> None:
    count, building = 0, Path(f"{out}.partial")
    try:
        with tarfile.open(building, "w") as tar:
            for count, (image, label) in enumerate(samples_of(Path(path)), 1):
                if not isinstance(image, bytes):
                    buffer = io.BytesIO()
                    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
                    image = buffer.getvalue()
                text = label if isinstance(label, bytes) else str(label).encode()
                for extension, data in {"image": image, **({} if label is None else {"cls": text})}.items():
                    info = tarfile.TarInfo(f"{count:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if not count:
            raise SystemExit(
                f"{path} has no array of images: bytes, (N, H, W), (N, H, W, C), (N, C, H, W), (H, W, C, N)"
            )
        building.replace(out)
    finally:
        building.unlink(missing_ok=True)
    print(f"{out}: {count} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
