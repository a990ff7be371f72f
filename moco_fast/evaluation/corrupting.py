"""Worker processes that corrupt or read images. Free of torch: each starts within a second.

What they compute of an image depends on the image alone, not on how many there are.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from moco_fast.evaluation.corruptions import Corruption
from shards.ground.child import Child, start_children
from shards.ground.errors import portable

__all__ = ["Workers", "corrupt_images", "main", "read_images"]

Bytes = npt.NDArray[np.uint8]


def corrupt_images(corruption: Corruption, images: Bytes, samples: Sequence[int]) -> Bytes:
    """Corrupt images (B, S, S, 3) with these sample numbers."""
    return np.stack([corruption(image, sample) for image, sample in zip(images, samples, strict=True)])


def read_images(size: int, files: Sequence[Path]) -> Bytes:
    """Read files as central squares of a size: (B, size, size, 3). Raises ValueError: a file is not an image."""
    return np.stack([_read(path, size) for path in files])


def _read(path: Path, size: int) -> Bytes:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): restore it") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.BILINEAR))


class Workers:
    """Processes that share the images of a batch; they end with the block or with this process.

    Args:
        count: of processes; with 1 the work is done in this one.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
        self._children = []

    def run(self, function: Callable[..., Bytes], shared: object, *rows: Any) -> Bytes:
        """Return `function(shared, *rows)`, computed in parts; `rows` are sequences of the same length."""
        if self._count == 1 or len(rows[0]) < 2:
            return function(shared, *rows)
        if not self._children:
            self._children = start_children(__name__, None, count=self._count, what="process that corrupts images")
        bounds = [len(rows[0]) * part // self._count for part in range(self._count + 1)]
        spans = [slice(*ends) for ends in pairwise(bounds) if ends[0] < ends[1]]
        working = self._children[: len(spans)]
        for child, span in zip(working, spans, strict=True):
            child.send((function, shared, [part[span] for part in rows]))
        return np.concatenate([child.receive() for child in working])


def main(connection: "Connection[Any, Any]", spec: None) -> None:
    """Do a worker's part until the parent is gone."""
    del spec
    cv2.setNumThreads(1)
    while True:
        function, shared, rows = connection.recv()
        try:
            result = function(shared, *rows)
        except Exception as error:
            connection.send(portable(error, "in a process that corrupts images"))
        else:
            connection.send(result)
