"""Views of one decoded image on the CPU, stage by stage, over libjpeg-turbo, torch's antialiased resize and OpenCV."""

import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from pipelines.backends.colors import recolor
from pipelines.plan.augment import ViewTable
from shards.ground.arrays import Pixels

__all__ = ["crop", "decode", "finish", "render"]


def decode(encoded: npt.NDArray[np.uint8]) -> Pixels:
    """Decode to (H, W, 3) uint8 RGB, as stored: not turned. Raises ValueError where nothing can read it."""
    try:
        return simplejpeg.decode_jpeg(encoded.data, colorspace="RGB")
    except ValueError:
        # CMYK and foreign shards' PNG; what is damaged fails here too, and says how.
        try:
            # A copy: Pillow's own memory is read-only, which torch warns of.
            return np.array(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot be decoded ({error})") from None


def render(image: Pixels, table: ViewTable, row: int, out: Pixels) -> None:
    """Write one view of an image to `out`, (S, S, 3) uint8: crop, resize, flip, blur, colors."""
    crop(image, table, row, out)
    finish(table, row, out)


def crop(image: Pixels, table: ViewTable, row: int, out: Pixels) -> None:
    """Write the first part of a view to `out`, (S, S, 3) uint8: crop, resize, flip.

    Unlike DALI and PIL, torch's resize reads no pixel outside the crop.
    """
    _crop_and_resize(image, table, row, out)
    if table.flip[row]:
        cv2.flip(out, 1, dst=out)


def finish(table: ViewTable, row: int, out: Pixels) -> None:
    """Do in place what follows crop, resize and flip: blur and colors of a view, (S, S, 3) uint8."""
    _blur(table, row, out)
    recolor(table, row, out)


def _crop_and_resize(image: Pixels, table: ViewTable, row: int, out: Pixels) -> None:
    x, y, w, h = table.box[row].tolist()
    size = out.shape[0]
    # Contiguous, or torch makes it so, in twice the time.
    cut = np.ascontiguousarray(image[y : y + h, x : x + w])
    region = torch.from_numpy(cut).permute(2, 0, 1)[None]
    # channels_last in and out: torch has a fast path for it, and `out` is filled in place.
    view = torch.from_numpy(out).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(region, [size, size], False, None, None, out=view)


def _blur(table: ViewTable, row: int, out: Pixels) -> None:
    sigma = float(table.sigma[row])
    if sigma > 0:
        taps = 2 * int(np.ceil(3 * sigma)) + 1
        # cv2.GaussianBlur takes twice the time for 8-bit images and is up to 1.4 levels off: this rounds once.
        kernel = cv2.getGaussianKernel(taps, sigma, cv2.CV_32F)
        cv2.sepFilter2D(out, -1, kernel, kernel, dst=out, borderType=cv2.BORDER_REFLECT_101)
