"""Kernels that FFCV's compiled code applies to one image: check its bytes, decode it, cut and color a view of it.

Compiled by numba. A view is resized and blurred in float32 and then rounded once; torchvision's color operations give
whole numbers from whole numbers.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# numba compiles these functions for the types that it meets.

import ctypes
from typing import Any

import numpy as np
from google_crc32c import _crc32c  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports] - a compiled module

from pipelines.backends.ffcv_library import libffcv, numba
from pipelines.plan.augment import NUM_PLACES, Stage

__all__ = ["apply_chain", "crc32c", "decode", "render"]

compiled: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy")
# Kept on disk: functions that call into C cannot be. Nor may one that takes a record: in the names by which machine
# code is linked, numba numbers record types as a process meets them, so those of two processes may have one name, and a
# process that reads both back from the disk runs one in place of the other.
compiled_once: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True)

# Rounds every operation as it is written: whole numbers stay whole.
compiled_exactly: Any = numba.njit(nogil=True, error_model="numpy", cache=True)

_RGB = 0
_BRIGHTNESS, _CONTRAST, _SATURATION = Stage.BRIGHTNESS.value, Stage.CONTRAST.value, Stage.SATURATION.value
_HUE, _GRAYSCALE, _SOLARIZE = Stage.HUE.value, Stage.GRAYSCALE.value, Stage.SOLARIZE.value

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
def render(image, box, flip, sigma, matrix, stages, factors, out):
    """Write a view of an image to `out`.

    Args:
        image: (H, 3 * W) uint8.
        box: (4,) x, y, width and height of the crop.
        flip: whether to mirror it.
        sigma: of the blur, in pixels of the view; 0: none.
        matrix: (3, 4) color map.
        stages: (NUM_PLACES,) of the color chain (pipelines.plan.augment).
        factors: (NUM_PLACES,).
        out: (S, S, 3) uint8.
    """
    size = out.shape[0]
    pixels = np.empty((size, 3 * size), np.float32)
    _resize(image, box[0], box[1], box[2], box[3], pixels)
    if flip:
        _mirror(pixels)
    if sigma > 0:
        _blur(pixels, sigma)
    planes = np.empty((3, size * size), np.float32)
    _apply_matrix(pixels.reshape(size * size, 3), matrix, planes)
    apply_chain(planes, stages, factors)
    for channel in range(3):
        out[:, :, channel] = planes[channel].reshape(size, size)


@compiled_once
def _apply_matrix(pixels, matrix, planes):
    """Map pixels, (n, 3), by a (3, 4) matrix, round and clamp them into planes, (3, n)."""
    for channel in range(3):
        m0, m1, m2, m3 = matrix[channel]
        for k in range(len(pixels)):
            value = m0 * pixels[k, 0] + m1 * pixels[k, 1] + m2 * pixels[k, 2] + m3
            planes[channel, k] = np.floor(min(max(value, np.float32(0)), np.float32(255)) + np.float32(0.5))


@compiled_exactly
def apply_chain(planes, stages, factors):
    """Apply a color chain (plan.augment.color_chain) as Pillow computes it; whole numbers in (3, n) float32."""
    for place in range(NUM_PLACES):
        stage, factor = stages[place], factors[place]
        if stage == _BRIGHTNESS:
            for channel in range(3):
                _blend(planes[channel], np.float32(0), factor)
        elif stage == _CONTRAST:
            pivot = np.float32(_mean_gray(planes))
            for channel in range(3):
                _blend(planes[channel], pivot, factor)
        elif stage == _SATURATION:
            _saturate(planes[0], planes[1], planes[2], factor)
        elif stage == _HUE:
            _shift_hue(planes[0], planes[1], planes[2], factor)
        elif stage == _GRAYSCALE:
            _saturate(planes[0], planes[1], planes[2], np.float32(0))
        elif stage == _SOLARIZE:
            for channel in range(3):
                values = planes[channel]
                for k in range(values.size):
                    values[k] = values[k] if values[k] < 128 else np.float32(255) - values[k]


@compiled_exactly
def _mix(origin, value, factor):
    mixed = origin + factor * (value - origin)
    return np.floor(min(max(mixed, np.float32(0)), np.float32(255)))


@compiled_exactly
def _blend(values, origin, factor):
    for k in range(values.size):
        values[k] = _mix(origin, values[k], factor)


@compiled_exactly
def _gray(r, g, b):
    return (np.int32(r) * np.int32(19595) + np.int32(g) * np.int32(38470) + np.int32(b) * np.int32(7471) + 0x8000) >> 16


@compiled_exactly
def _mean_gray(planes):
    total = 0
    for k in range(planes.shape[1]):
        total += _gray(planes[0, k], planes[1, k], planes[2, k])
    return int(total / planes.shape[1] + 0.5)


@compiled_exactly
def _saturate(red, green, blue, factor):
    for k in range(red.size):
        r, g, b = red[k], green[k], blue[k]
        gray = np.float32(_gray(r, g, b))
        red[k], green[k], blue[k] = _mix(gray, r, factor), _mix(gray, g, factor), _mix(gray, b, factor)


@compiled_exactly
def _shift_hue(red, green, blue, steps):
    """To Pillow's 8-bit HSV, on by so many of 256 steps of hue, and back."""
    one, full = np.float32(1), np.float32(255)
    for k in range(red.size):
        r, g, b = red[k], green[k], blue[k]
        high, low = max(r, g, b), min(r, g, b)
        chroma = high - low
        safe = max(chroma, one)
        r_away, g_away, b_away = (high - r) / safe, (high - g) / safe, (high - b) / safe
        not_red = np.float32(2) + r_away - b_away if g == high else np.float32(4) + g_away - r_away
        sixths = b_away - g_away if r == high else not_red
        turns = sixths / np.float32(6) + one
        hue = np.floor((turns - np.floor(turns)) * full) + steps
        hue = (hue - np.float32(256) if hue >= 256 else hue) * np.float32(6) / full
        saturation = np.floor(chroma * full / max(high, one)) / full
        red[k] = _channel(hue, np.float32(5), high, saturation)
        green[k] = _channel(hue, np.float32(3), high, saturation)
        blue[k] = _channel(hue, one, high, saturation)


@compiled_exactly
def _channel(hue, offset, value, saturation):
    """A channel of an HSV color, hue in sixths of a turn: red is farthest from its full value at 5 - 2, and so on."""
    along = offset + hue
    along = along - np.float32(6) * np.floor(along / np.float32(6))
    share = max(np.float32(0), min(min(along, np.float32(4) - along), np.float32(1)))
    return np.floor(value * (np.float32(1) - saturation * share) + np.float32(0.5))


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
