"""Views in plain float64 numpy, one pixel's definition at a time: what every backend is compared with.

Nothing is rounded between the stages; but torchvision's color operations take and give 8-bit images.
"""

import io

import numpy as np
import torchvision.transforms.functional as F
from PIL import Image, ImageOps

LUMA = np.array([0.299, 0.587, 0.114])


def decode(encoded) -> np.ndarray:
    """(H, W, 3) float64 in 0..255."""
    return np.asarray(Image.open(io.BytesIO(bytes(encoded))).convert("RGB")).astype(np.float64)


def resize_axis(image: np.ndarray, axis: int, start: int, extent: int, size: int, *, inside: bool) -> np.ndarray:
    """Triangle filter, as wide as a source pixel when enlarging and as an output pixel when shrinking.

    `inside`: read only the region's own pixels (as torch does), weights summing to one over them; else also those of
    the image around it, and its outermost pixel again and again beyond (as DALI does).
    """
    length = image.shape[axis]
    low, high = (start, start + extent) if inside else (0, length)
    scale = extent / size
    reach = 0 if inside else int(np.ceil(max(scale, 1.0))) + 1
    centers = start + (np.arange(size)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1 - np.abs(np.arange(low - reach, high + reach) + 0.5 - centers) / max(scale, 1.0))
    weights /= weights.sum(axis=1, keepdims=True)
    if reach:
        weights[:, reach] += weights[:, :reach].sum(axis=1)
        weights[:, -reach - 1] += weights[:, -reach:].sum(axis=1)
        weights = weights[:, reach:-reach]
    lines = np.moveaxis(image, axis, 0)[low:high]
    result = weights @ lines.reshape(len(lines), -1)
    return np.moveaxis(result.reshape(size, *lines.shape[1:]), 0, axis)


def resize(image: np.ndarray, box, size: int, *, inside: bool) -> np.ndarray:
    """(H, W, 3) to (size, size, 3), region x, y, w, h."""
    x, y, w, h = (int(value) for value in box)
    tall = resize_axis(image, 1, x, w, size, inside=inside)
    return resize_axis(tall, 0, y, h, size, inside=inside)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian cut at ceil(3 sigma), mirrored at the border without repeating the outermost pixel."""
    if sigma == 0:
        return image
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, pad, mode="reflect")
        size = image.shape[axis]
        image = sum(
            weight * np.take(padded, np.arange(size) + offset + radius, axis=axis)
            for weight, offset in zip(weights, offsets, strict=True)
        )
    return image


def colors(image: np.ndarray, table, row: int) -> np.ndarray:
    """Torchvision's own operations on a Pillow image, (H, W, 3) uint8, as in the MoCo authors' transforms."""
    picture = Image.fromarray(image)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    if table.grayscale[row] and table.grayscale_first:
        picture = F.to_grayscale(picture, 3)
    for stage in table.jitter_order[row].tolist():
        factor = float(table.factors[row, stage])
        # Without jitter nothing is applied: a hue shifted by nothing would still be rounded to 8 bits.
        if factor != (0.0 if stage == 3 else 1.0):
            picture = adjust[stage](picture, factor)
    if table.grayscale[row] and not table.grayscale_first:
        picture = F.to_grayscale(picture, 3)
    return np.asarray(ImageOps.solarize(picture) if table.solarize[row] else picture)


def view(encoded, table, row: int, size: int, *, inside: bool = False) -> np.ndarray:
    """All stages: (size, size, 3) float64 in 0..255, not rounded."""
    image = resize(decode(encoded), table.box[row], size, inside=inside)
    if table.flip[row]:
        image = image[:, ::-1]
    image = blur(image, float(table.sigma[row]))
    if table.matrix is None:
        return colors(np.rint(image).astype(np.uint8), table, row).astype(np.float64)
    matrix = table.matrix[row].astype(np.float64)
    image = np.clip(image @ matrix[:, :3].T + matrix[:, 3], 0, 255)
    if table.solarize[row]:
        image = np.where(image >= 127.5, 255 - image, image)
    return image
