"""Files to be embedded, written embeddings of given values, and what a naive search finds in them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from moco_fast.embedding import formats
from moco_fast.embedding.formats import format_of
from moco_fast.embedding.index import Index, Row, open_index
from moco_fast.embedding.stream import Rows
from shards.ground.digests import digest

CPU = torch.device("cpu")


def photos_of_noise(folder: Path, *, num: int) -> Path:
    """Write a folder of images and of one file that is broken."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def rows_of(values: npt.NDArray[Any], first: int) -> Rows:
    count = len(values)
    numbers = np.arange(first, first + count)
    return Rows(
        values=values,
        index=10 * numbers,
        keys=100 * numbers,
        labels=numbers % 3 - 1,
        sources=[None if number % 2 else f'a "quoted", name {number}' for number in numbers.tolist()],
        damaged=(),
    )


def written(out: Path, parts: list[npt.NDArray[Any]], *, group_bytes: int = formats._GROUP_BYTES) -> Index:
    """Embeddings of given values, part by part as `moco-fast embed` writes them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(formats, "_GROUP_BYTES", group_bytes)
        return _written(out, parts)


def _written(out: Path, parts: list[npt.NDArray[Any]]) -> Index:
    folder = out.parent / f"parts of {out.name}"
    folder.mkdir()
    stems: list[Path] = []
    for number, values in enumerate(parts):
        stems.append(folder / f"part-{number:06d}")
        format_of(out).write_part(stems[-1], rows_of(values, sum(map(len, parts[:number]))), ("cat", "dog"))
    header = {
        "format": "moco-fast-embeddings",
        "num_rows": sum(map(len, parts)),
        "dim": parts[0].shape[1],
        "vectors": digest(*map(np.ascontiguousarray, parts)),
        "encoder": "somewhere",
        "images": "elsewhere",
        "are_shards": False,
        "class_names": ["cat", "dog"],
        "settings": {"dtype": str(parts[0].dtype), "layer": "backbone"},
    }
    format_of(out).finish(stems, out, header, [])
    return open_index(out)


def naive(values: npt.NDArray[Any], query: npt.NDArray[Any], k: int) -> list[tuple[float, int]]:
    """Cosines by their definition in float64, one by one, the highest first; of equal ones the first row first."""
    cosines = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in values.astype(np.float64)]
    return sorted(((cosine, row) for row, cosine in enumerate(cosines)), key=lambda pair: (-pair[0], pair[1]))[:k]


class InMemory(Index):
    """An index of given chunks."""

    def __init__(self, chunks: list[npt.NDArray[Any]]) -> None:
        super().__init__(Path("memory"), {"num_rows": sum(map(len, chunks)), "dim": chunks[0].shape[1]})
        self._chunks = chunks

    def chunks(self, begin: int = 0) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        row = 0
        for chunk in self._chunks:
            skipped = max(0, begin - row)
            if skipped < len(chunk):
                yield row + skipped, chunk[skipped:]
            row += len(chunk)

    def vectors(self, numbers: Any) -> npt.NDArray[Any]:
        return np.concatenate(self._chunks)[numbers]

    def rows(self, numbers: Any) -> list[Row]:
        raise NotImplementedError

    def all_rows(self) -> Iterator[Row]:
        raise NotImplementedError
