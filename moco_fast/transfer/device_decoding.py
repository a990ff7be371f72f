"""Decoding and resizing of training images on a GPU, by DALI; what is not a plain JPEG stays with Pillow on the CPU."""

import io
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from shards.images.jpeg import ENGINE_KINDS, JpegError, is_jpeg, parse_jpeg
from shards.images.scan import looks_whole

__all__ = ["DeviceDecoder", "is_plain", "open_decoder"]

_THREADS = 4  # of DALI's own, which prepare what the GPU decodes


class DeviceDecoder:
    """JPEGs to pixels on a device.

    Args:
        device: a GPU; on the CPU, it does the same there, as tests want it.
        batch_size: most images at a time.
    """

    def __init__(self, device: torch.device, *, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._pipeline: Any = None

    def resized(
        self, encoded: Sequence[bytes], sizes: Sequence[tuple[int, int]], mirrored: Sequence[bool]
    ) -> list[Tensor]:
        """Decode, resize and mirror images; when it returns, they are complete.

        Args:
            encoded: plain JPEGs (`is_plain`).
            sizes: height and width that each gets.
            mirrored: whether its left and right change sides.

        Returns:
            for each image (3, height, width) uint8 on the device.

        Raises:
            RuntimeError: one of them cannot be decoded.
        """
        from pipelines.backends.dali import to_torch

        if self._pipeline is None:
            self._pipeline = _decoding(self._device, self._batch_size)
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
            [decoded] = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # It is of no use any more.
            raise
        with self._own_stream():
            images = [
                v2.resize(to_torch(decoded[number]).permute(2, 0, 1), list(size)) for number, size in enumerate(sizes)
            ]
            images = [image.flip(2) if flips else image for image, flips in zip(images, mirrored, strict=True)]
        if self._stream is not None:
            # This thread waits, and the training does not; then DALI may have its memory back.
            self._stream.synchronize()
        return images

    def _own_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def is_plain(data: bytes, size: tuple[int, int]) -> bool:
    """Return whether an image may be decoded on a GPU: a whole baseline JPEG of gray or YCbCr, upright, of this size.

    All else Pillow decodes, or refuses, as without a GPU: a GPU's decoders let damage pass, and differ in what they
    make of other colors and of images that are to be turned.

    Args:
        data: the file.
        size: width and height.
    """
    if not is_jpeg(data):
        return False
    try:
        header = parse_jpeg(data)
    except JpegError:
        return False
    is_usual = header.kind in ENGINE_KINDS and header.orientation == 1
    return is_usual and (header.width, header.height) == size and looks_whole(data, header.scan_at)


def open_decoder(device: torch.device, *, batch_size: int) -> DeviceDecoder | None:
    """Return what decodes on a device, after a trial; None on a CPU, and where it does not work, which is said."""
    if device.type != "cuda":
        return None
    trial = io.BytesIO()
    Image.new("RGB", (32, 16), (200, 100, 50)).save(trial, "JPEG")
    try:
        decoder = DeviceDecoder(device, batch_size=batch_size)
        [image] = decoder.resized([trial.getvalue()], [(8, 16)], [True])
        assert image.shape == (3, 8, 16)
    # Whatever a driver or a library that does not fit it raises: then Pillow decodes, as on a CPU.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"note: images are decoded on the CPU: DALI does not decode on {device} ({reason})", file=sys.stderr)
        return None
    return decoder


def _index(device: torch.device) -> int:
    index: Any = device.index  # None on some devices, whatever its type says
    return torch.cuda.current_device() if index is None else index


def _decoding(device: torch.device, batch_size: int) -> Any:
    fn, types, pipeline = (import_module(f"nvidia.dali.{name}") for name in ("fn", "types", "pipeline"))
    pipeline_def: Any = pipeline.pipeline_def
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=_THREADS,
        device_id=_index(device) if on_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    def decoded() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        # What is to be turned does not come here.
        return fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )

    built = decoded()
    built.build()
    return built
