"""Views of one decoded image on the CPU, stage by stage, over libjpeg-turbo, torch's antialiased resize and OpenCV."""

import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torchvision.transforms.functional as F
from PIL import Image

from pipelines.augment import ViewTable

__all__ = ["decode", "recolor", "render", "render_as_torchvision"]

Pixels = npt.NDArray[np.uint8]

_INVERTED_FROM_128: Pixels = np.array([v if v < 128 else 255 - v for v in range(256)], dtype=np.uint8)
_IDENTITY = np.concatenate((np.eye(3), np.zeros((3, 1))), axis=1).astype(np.float32)


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
    """Write one view of an image to `out`, (S, S, 3) uint8.

    Unlike DALI and PIL, torch's resize reads no pixel outside the crop.
    """
    _crop_and_resize(image, table, row, out)
    if table.flip[row]:
        cv2.flip(out, 1, dst=out)
    _blur(table, row, out)
    recolor(table, row, out)


def recolor(table: ViewTable, row: int, out: Pixels) -> None:
    """Apply the color matrix of a sample, and solarize, to (S, S, 3) uint8 in place."""
    matrix = table.matrix[row]
    if not np.array_equal(matrix, _IDENTITY):
        cv2.transform(out, matrix, dst=out)
    if table.solarize[row]:
        cv2.LUT(out, _INVERTED_FROM_128, dst=out)


def render_as_torchvision(image: Pixels, table: ViewTable, row: int, out: Pixels, *, grayscale_first: bool) -> None:
    """Write one view as a chain of torchvision's own operations would: the control for `render`.

    The parameters are the same; brightness, contrast, saturation, hue and grayscale are applied one by one to uint8,
    then blur, solarize and flip.
    """
    _crop_and_resize(image, table, row, out)
    view = torch.from_numpy(out).permute(2, 0, 1)
    if grayscale_first and table.grayscale[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for stage in table.jitter_order[row].tolist():
        factor = float(table.factors[row, stage])
        if factor != (0.0 if stage == 3 else 1.0):
            view = adjust[stage](view, factor)
    if not grayscale_first and table.grayscale[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    np.copyto(out, view.permute(1, 2, 0).numpy())
    _blur(table, row, out)
    if table.solarize[row]:
        cv2.LUT(out, _INVERTED_FROM_128, dst=out)
    if table.flip[row]:
        cv2.flip(out, 1, dst=out)


def _crop_and_resize(image: Pixels, table: ViewTable, row: int, out: Pixels) -> None:
    x, y, w, h = table.box[row].tolist()
    size = out.shape[0]
    region = torch.from_numpy(image[y : y + h, x : x + w]).permute(2, 0, 1)[None]
    # channels_last in and out: torch has a fast path for it, and `out` is filled in place.
    view = torch.from_numpy(out).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(region, [size, size], False, None, None, out=view)


def _blur(table: ViewTable, row: int, out: Pixels) -> None:
    sigma = float(table.sigma[row])
    if sigma > 0:
        taps = 2 * int(np.ceil(3 * sigma)) + 1
        cv2.GaussianBlur(out, (taps, taps), sigma, dst=out, borderType=cv2.BORDER_REFLECT_101)
