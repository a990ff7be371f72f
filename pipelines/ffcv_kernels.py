"""What FFCV's compiled code does to one image: check its bytes, decode it, cut and color a view of it.

Compiled by numba. All stages of a view are in float32, rounded once at the end.
"""

import ctypes
from typing import Any

import numpy as np
from google_crc32c import _crc32c  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

from pipelines.ffcv_library import libffcv, numba

__all__ = ["crc32c", "decode", "render"]

compiled: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy")
# Kept on disk: functions that call into C cannot be.
compiled_once: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True)

_RGB = 0

# FFCV's own `imdecode` takes the fast and inexact DCT, and says nothing of damage: libjpeg-turbo, which its library is
# linked to, is called directly.
_open_decoder = libffcv.tjInitDecompress
_open_decoder.argtypes, _open_decoder.restype = [], ctypes.c_void_p
_decompress = libffcv.tjDecompress2
_decompress.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]
_close_decoder = libffcv.tjDestroy
_close_decoder.argtypes = [ctypes.c_void_p]

_crc32c_extend = ctypes.CDLL(_crc32c.__file__).crc32c_extend
_crc32c_extend.argtypes, _crc32c_extend.restype = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint32


@compiled
def crc32c(data):
    """CRC-32C of a run of bytes."""
    return _crc32c_extend(0, data.ctypes.data, data.size)


@compiled
def decode(encoded, image):
    """Decode a JPEG to `image`, (H, 3 * W) uint8 RGB. False where libjpeg-turbo has anything to complain of."""
    decoder = _open_decoder()
    height, width = image.shape[0], image.shape[1] // 3
    failed = _decompress(decoder, encoded.ctypes.data, encoded.size, image.ctypes.data, width, 0, height, _RGB, 0)
    _close_decoder(decoder)
    return failed == 0


@compiled_once
def render(image, row, view, out):
    """Write a view of an image to `out`, (S, S, 3) uint8.

    Args:
        image: (H, 3 * W) uint8.
        row: parameters of the sample's views (pipelines.ffcv).
        view: number of the view.
        out: (S, S, 3) uint8.
    """
    size = out.shape[0]
    pixels = np.empty((size, 3 * size), np.float32)
    _resize(image, row["box"][view, 0], row["box"][view, 1], row["box"][view, 2], row["box"][view, 3], pixels)
    if row["flip"][view]:
        _mirror(pixels)
    if row["sigma"][view] > 0:
        _blur(pixels, row["sigma"][view])
    matrix = row["matrix"]
    solarize = row["solarize"][view] != 0
    m00, m01, m02, m03 = matrix[view, 0, 0], matrix[view, 0, 1], matrix[view, 0, 2], matrix[view, 0, 3]
    m10, m11, m12, m13 = matrix[view, 1, 0], matrix[view, 1, 1], matrix[view, 1, 2], matrix[view, 1, 3]
    m20, m21, m22, m23 = matrix[view, 2, 0], matrix[view, 2, 1], matrix[view, 2, 2], matrix[view, 2, 3]
    for i in range(size):
        for j in range(size):
            r, g, b = pixels[i, 3 * j], pixels[i, 3 * j + 1], pixels[i, 3 * j + 2]
            out[i, j, 0] = _finish(m00 * r + m01 * g + m02 * b + m03, solarize)
            out[i, j, 1] = _finish(m10 * r + m11 * g + m12 * b + m13, solarize)
            out[i, j, 2] = _finish(m20 * r + m21 * g + m22 * b + m23, solarize)


@compiled_once
def _finish(value, solarize):
    rounded = np.uint8(min(max(value, np.float32(0)), np.float32(255)) + np.float32(0.5))
    return np.uint8(255) - rounded if solarize and rounded >= 128 else rounded


@compiled_once
def _taps(extent, size):
    """Weights by which `size` pixels are made of `extent`: a triangle, wide enough to shrink, cut at the border.

    Returns:
        (size,) first tap, (size,) number of taps, (size, most) weights.
    """
    scale = extent / size
    reach = max(scale, 1.0)
    first, num = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, int(2 * reach) + 3), np.float32)
    for i in range(size):
        center = (i + 0.5) * scale
        begin = max(0, int(np.floor(center - reach)))
        end = min(extent, int(np.ceil(center + reach)))
        total = 0.0
        for tap in range(begin, end):
            total += max(0.0, 1.0 - abs(tap + 0.5 - center) / reach)
        for tap in range(begin, end):
            weights[i, tap - begin] = max(0.0, 1.0 - abs(tap + 0.5 - center) / reach) / total
        first[i], num[i] = begin, end - begin
    return first, num, weights


@compiled_once
def _resize(image, x, y, width, height, out):
    """Shrink or enlarge a region to `out`, (S, 3 * S): first all rows, whose pixels lie side by side, then columns."""
    size = out.shape[0]
    first, num, weights = _taps(height, size)
    across_first, across_num, across_weights = _taps(width, size)
    line = np.empty(3 * width, np.float32)
    for i in range(size):
        line[:] = 0
        for tap in range(num[i]):
            weight = weights[i, tap]
            source = image[y + first[i] + tap, 3 * x : 3 * (x + width)]
            for k in range(line.size):
                line[k] += weight * np.float32(source[k])
        for j in range(size):
            r = g = b = np.float32(0)
            at = 3 * across_first[j]
            for tap in range(across_num[j]):
                weight = across_weights[j, tap]
                r += weight * line[at + 3 * tap]
                g += weight * line[at + 3 * tap + 1]
                b += weight * line[at + 3 * tap + 2]
            out[i, 3 * j], out[i, 3 * j + 1], out[i, 3 * j + 2] = r, g, b


@compiled_once
def _mirror(pixels):
    size = pixels.shape[0]
    for i in range(size):
        for j in range(size // 2):
            for c in range(3):
                left, right = 3 * j + c, 3 * (size - 1 - j) + c
                pixels[i, left], pixels[i, right] = pixels[i, right], pixels[i, left]


@compiled_once
def _reflect(at, size):
    """Place of a pixel beyond the border: mirrored, the outermost one not twice."""
    while at < 0 or at >= size:
        at = -at if at < 0 else 2 * (size - 1) - at
    return at


@compiled_once
def _blur(pixels, sigma):
    """Gaussian cut at ceil(3 sigma), in place."""
    size = pixels.shape[0]
    radius = int(np.ceil(3 * sigma))
    kernel = np.empty(2 * radius + 1, np.float32)
    for k in range(kernel.size):
        kernel[k] = np.exp(-0.5 * ((k - radius) / sigma) ** 2)
    kernel /= kernel.sum()
    lines = np.zeros_like(pixels)
    wide = np.empty(3 * (size + 2 * radius), np.float32)
    for i in range(size):
        for j in range(-radius, size + radius):
            source = 3 * _reflect(j, size)
            for c in range(3):
                wide[3 * (j + radius) + c] = pixels[i, source + c]
        for k in range(kernel.size):
            weight = kernel[k]
            for j in range(3 * size):
                lines[i, j] += weight * wide[3 * k + j]
    pixels[:] = 0
    for i in range(size):
        for k in range(kernel.size):
            weight, source = kernel[k], _reflect(i + k - radius, size)
            for j in range(3 * size):
                pixels[i, j] += weight * lines[source, j]
