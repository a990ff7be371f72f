"""CIFAR-10 and CIFAR-100 as they are downloaded, as Python batches or binary, unpacked or not.

    cifar-10-python.tar.gz, cifar-10-batches-py     data_batch_1 ... data_batch_5, test_batch; batches.meta
    cifar-10-binary.tar.gz, cifar-10-batches-bin    the same with .bin; batches.meta.txt
    cifar-100-python.tar.gz, cifar-100-python       train, test; meta
    cifar-100-binary.tar.gz, cifar-100-binary       train.bin, test.bin; fine_label_names.txt

Python's batches are pickles, which could run any code: only lists, texts, numbers and one array of bytes are read.
"""

import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from shards.config import SourceOptions
from shards.ground.errors import PackError
from shards.sources.base import Found, Input, Source, printable
from shards.sources.parts import chosen_part
from shards.storage.small_files import small_files
from shards.storage.stores import is_url, open_bytes

__all__ = ["CifarSource"]

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_PPM_HEADER = b"P6\n32 32\n255\n"


class _Kind(NamedTuple):
    """One of the four forms that the data sets come in."""

    title: str
    folder: str
    archive: str
    parts: dict[str, tuple[str, ...]]
    """Files of each part."""
    names: str
    """File of the classes' names."""
    labels: str
    """What labels are called in a Python batch, names of classes beside it; empty: binary."""
    label_at: int = 0
    """Byte of a binary record that is the label; the pixels follow the last label."""
    num_labels: int = 1


_TEN = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_HUNDRED = {"train": ("train",), "test": ("test",)}


def _binary(parts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {part: tuple(f"{name}.bin" for name in names) for part, names in parts.items()}


_KINDS = (
    _Kind("CIFAR-10", "cifar-10-batches-py", "cifar-10-python", _TEN, "batches.meta", "label"),
    _Kind("CIFAR-100", "cifar-100-python", "cifar-100-python", _HUNDRED, "meta", "fine_label"),
    _Kind("CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary", _binary(_TEN), "batches.meta.txt", ""),
    _Kind("CIFAR-100", "cifar-100-binary", "cifar-100-binary", _binary(_HUNDRED), "fine_label_names.txt", "", 1, 2),
)


class CifarSource:
    """The images of one part, whose pixels are kept beside the plan: inside a pickle none could be read alone.

    Args:
        path: folder or archive.
        kind: number of the form that it has.
        part: train or test.
        spool: the pixels.
    """

    is_remote = False

    def __init__(self, path: str, kind: int = 0, part: str = "", spool: Path | None = None) -> None:
        self.path = path
        self._kind = _KINDS[kind]
        self._part = part
        self._spool = spool

    @classmethod
    def recognize(cls, path: str, options: SourceOptions) -> Self | None:
        """Return a source for one of the folders, for a folder that holds one of them, or for an archive.

        Raises:
            ValueError: the subset is not there or was not chosen, or there are several data sets.
        """
        found = _find(path)
        if not found:
            return None
        if len(found) > 1:
            raise ValueError(f"{path} holds several data sets: give {' or '.join(where for where, _ in found)}")
        [(where, kind)] = found
        return cls(where, kind, chosen_part(path, _KINDS[kind].parts, options.subset))

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        assert self._spool is not None
        return {"kind": "cifar", "path": self.path, "spool": self._spool.name}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found]:
        """List the images in the order of the batches, and copy their pixels."""
        self._spool, kind = spool, self._kind
        files = kind.parts[self._part]
        found = small_files(self.path, {*files, kind.names})
        for name in (*files, kind.names):
            if name not in found:
                raise PackError(f"{self.path} lacks {name}: get all of {kind.title}")
        names = _class_names(found[kind.names], kind, f"{self.path}/{kind.names}")
        at = 0
        with spool.open("wb") as target:
            for name in files:
                read = _read_pickle if kind.labels else _read_binary
                labels, pixels = read(found[name], kind, f"{self.path}/{name}")
                if len(labels) and not 0 <= min(labels) <= max(labels) < len(names):
                    raise PackError(f"{self.path}/{name} has labels that {kind.names} does not name: get it again")
                # From planes of one color each to pixels of three.
                target.write(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1).tobytes())
                for row, label in enumerate(labels):
                    yield Input(f"{name}/{row:05d}".encode(), None, names[label], at, _PIXEL_BYTES)
                    at += _PIXEL_BYTES
        count = at // _PIXEL_BYTES
        yield Found(f"{self.path}: {kind.title}, {self._part}, {count:,} images of {len(names)} classes", names)

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return an image as a PPM file, which is nothing but its pixels: their digest depends on no library."""
        del name
        assert self._spool is not None
        return _PPM_HEADER + open_bytes(str(self._spool)).read(offset, size)

    def describe(self, name: bytes) -> str:
        """Return the path of the batch and the number of the image in it."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def _find(path: str) -> list[tuple[str, int]]:
    """Return the data sets at a path, each with the number of its form."""
    base = path.rstrip("/").rpartition("/")[2]
    if is_url(path) or not Path(path).is_dir():
        is_archive = re.compile(r"(cifar-100?-(?:python|binary))\.(?:tar|tar\.gz|tgz)").fullmatch(base)
        return [(path, i) for i, kind in enumerate(_KINDS) if is_archive and is_archive[1] == kind.archive]
    top = path.rstrip("/")
    here = [(top, i) for i, kind in enumerate(_KINDS) if _holds(top, kind)]
    below = ((f"{top}/{kind.folder}", i) for i, kind in enumerate(_KINDS))
    return here or [(where, i) for where, i in below if _holds(where, _KINDS[i])]


def _holds(folder: str, kind: _Kind) -> bool:
    names = [*(name for files in kind.parts.values() for name in files[:1]), kind.names]
    return all((Path(folder) / name).is_file() for name in names)


def _class_names(data: bytes, kind: _Kind, where: str) -> tuple[str, ...]:
    if not kind.labels:
        return tuple(data.decode().split())
    found = _load(data, where).get(f"{kind.labels}_names")
    if not isinstance(found, list):
        raise PackError(f"{where} names no classes: get it again")
    names = cast("list[Any]", found)
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _read_binary(data: bytes, kind: _Kind, where: str) -> tuple[list[int], NDArray[np.uint8]]:
    """Return the labels and (N, 3072) pixels of a binary batch."""
    record_bytes = kind.num_labels + _PIXEL_BYTES
    if len(data) % record_bytes:
        raise PackError(f"{where} has {len(data)} bytes, not a multiple of {record_bytes}: it is cut, get it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record_bytes)
    return records[:, kind.label_at].tolist(), records[:, kind.num_labels :]


def _read_pickle(data: bytes, kind: _Kind, where: str) -> tuple[list[int], NDArray[np.uint8]]:
    """Return the labels and (N, 3072) pixels of a Python batch."""
    batch = _load(data, where)
    array, found = batch.get("data"), batch.get(f"{kind.labels}s")
    labels = [int(label) for label in cast("list[Any]", found)] if isinstance(found, list) else None
    if not isinstance(array, _Array) or labels is None or array.shape != (len(labels), _PIXEL_BYTES):
        raise PackError(f"{where} does not hold an image of 32 x 32 pixels for each label: get it again")
    return labels, np.frombuffer(array.data, dtype=np.uint8).reshape(array.shape)


class _Array:
    """An array of bytes in a pickle, as far as it is needed."""

    shape: tuple[int, ...] = ()
    data: bytes = b""

    @staticmethod
    def reconstruct(*arguments: Any) -> "_Array":
        """Stand for numpy's `_reconstruct`: the content comes by `__setstate__`."""
        del arguments
        return _Array()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or is_fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of something else than bytes, row after row")
        self.shape, self.data = tuple(int(side) for side in shape), data


class _Dtype:
    """A dtype in a pickle."""

    def __init__(self, code: Any, *rest: Any) -> None:
        del rest
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        del state  # byte order and the like, which bytes do not have


def _encode(text: str, encoding: str) -> bytes:
    """Stand for `codecs.encode`, by which Python 3 writes bytes into pickles of Python 2's protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a text in {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array.reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Array.reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module_name}.{global_name}, which such a file needs not") from None


def _load(data: bytes, where: str) -> dict[str, Any]:
    """Return a batch's dictionary. Raises PackError: it holds anything but plain values and arrays of bytes."""
    try:
        found: Any = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}
    # A pickle is a program: what a damaged one runs into can be anything.
    except Exception as error:
        raise PackError(f"{where} is not a batch of CIFAR's ({type(error).__name__}: {error}): get it again") from None
