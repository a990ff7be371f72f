"""Color operations of a whole batch on the GPU: torchvision's on 8-bit images, as two Triton kernels for all views.

The first takes the mean gray value of each image that contrast pivots about, the second applies everything in place: a
batch is read twice and written once. Per pixel they compute what Pillow does, down to its 8-bit HSV, so that a view
differs from torchvision's by single levels where a product falls on the edge of an integer.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# Triton compiles these functions; their values have no types in Python.

import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pipelines.plan.augment import NUM_PLACES, Stage, ViewTable, color_chain

__all__ = ["KERNELS", "recolor_batch"]

_BLOCK = 512

_BRIGHTNESS = tl.constexpr(Stage.BRIGHTNESS.value)
_CONTRAST = tl.constexpr(Stage.CONTRAST.value)
_SATURATION = tl.constexpr(Stage.SATURATION.value)
_HUE = tl.constexpr(Stage.HUE.value)
_GRAYSCALE = tl.constexpr(Stage.GRAYSCALE.value)
_SOLARIZE = tl.constexpr(Stage.SOLARIZE.value)
_PLACES = tl.constexpr(NUM_PLACES)


def recolor_batch(views: Sequence[torch.Tensor], tables: Sequence[ViewTable]) -> None:
    """Apply jitter, grayscale and solarize to (n, H, W, 3) uint8 views in place, on the current stream.

    Args:
        views: contiguous, on the GPU; with Triton's interpreter (TRITON_INTERPRET=1) on the CPU.
        tables: what is done to each of them.

    Raises:
        ValueError: Triton cannot compile here. It does so at the first batch, before any training step.
    """
    for view, table in zip(views, tables, strict=True):
        if table.matrix is not None:
            _apply_matrix(view, table.matrix)
    chains = [color_chain(table) for table in tables]
    if all((stages == Stage.NOTHING).all() for stages, _ in chains):
        return
    stages = torch.from_numpy(np.stack([stages for stages, _ in chains])).to(views[0].device)
    factors = torch.from_numpy(np.stack([factors for _, factors in chains])).to(views[0].device)
    sums = torch.zeros(stages.shape[:2], dtype=torch.int32, device=views[0].device)
    for view, *of_view in zip(views, stages, factors, sums, strict=True):
        num, height, width, _ = view.shape
        grid = (triton.cdiv(height * width, _BLOCK), num)
        # A multiplication and an addition are rounded apart, as on the CPU.
        options: dict[str, Any] = {"block": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
        try:
            for kernel in KERNELS:
                kernel[grid](view, *of_view, height * width, **options)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"the GPU's color kernels cannot be compiled or run here ({error}): Triton needs a C compiler and "
                "Python's headers (gcc and python3-dev on Debian); or use --views.color linear with shards that were "
                "packed with --mean-rgb"
            ) from error


def _apply_matrix(view: torch.Tensor, matrix: npt.NDArray[np.float32]) -> None:
    given = torch.from_numpy(np.ascontiguousarray(matrix)).to(view.device)
    pixels = view.flatten(1, 2)
    mapped = torch.baddbmm(given[:, None, :, 3], pixels.float(), given[:, :, :3].mT)
    pixels.copy_(mapped.round_().clamp_(0, 255))


@triton.jit
def _gray(r, g, b):
    """Pillow's conversion to "L"; values are whole numbers in float32."""
    return ((r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471 + 0x8000) >> 16).to(tl.float32)


@triton.jit
def _blend(origin, value, factor):
    return tl.floor(tl.minimum(tl.maximum(origin + factor * (value - origin), 0.0), 255.0))


@triton.jit
def _shift_hue(r, g, b, steps):
    """To Pillow's 8-bit HSV, on by so many of 256 steps of hue, and back."""
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = high - low
    safe = tl.where(chroma > 0, chroma, 1.0)
    # tl.div_rn: what `/` compiles to is a little off, and 255 would become 254.
    from_r, from_g, from_b = tl.div_rn(high - r, safe), tl.div_rn(high - g, safe), tl.div_rn(high - b, safe)
    sixths = tl.where(r == high, from_b - from_g, tl.where(g == high, 2.0 + from_r - from_b, 4.0 + from_g - from_r))
    turns = tl.div_rn(sixths, 6.0) + 1.0
    turns = turns - tl.floor(turns)
    saturation = tl.div_rn(tl.floor(tl.div_rn(chroma * 255.0, tl.maximum(high, 1.0))), 255.0)
    hue = tl.floor(turns * 255.0) + steps
    hue = tl.div_rn(tl.where(hue >= 256.0, hue - 256.0, hue) * 6.0, 255.0)
    sector = tl.floor(hue)
    rest = hue - sector
    falling = tl.floor(high * (1.0 - saturation * rest) + 0.5)
    rising = tl.floor(high * (1.0 - saturation * (1.0 - rest)) + 0.5)
    least = tl.floor(high * (1.0 - saturation) + 0.5)
    red = tl.where(sector == 1, falling, tl.where((sector == 2) | (sector == 3), least, high))
    red = tl.where(sector == 4, rising, red)
    green = tl.where(sector == 3, falling, tl.where((sector == 4) | (sector == 5), least, high))
    green = tl.where((sector == 0) | (sector == 6), rising, green)
    blue = tl.where(sector == 5, falling, tl.where((sector == 3) | (sector == 4), high, least))
    blue = tl.where(sector == 2, rising, blue)
    has_hue = chroma > 0
    return tl.where(has_hue, red, r), tl.where(has_hue, green, g), tl.where(has_hue, blue, b)


@triton.jit
def _apply(stage, factor, r, g, b, pivot):
    # A stage is the same for all pixels of a program: these are branches, not selections.
    if stage == _BRIGHTNESS:
        r, g, b = _blend(0.0, r, factor), _blend(0.0, g, factor), _blend(0.0, b, factor)
    if stage == _CONTRAST:
        r, g, b = _blend(pivot, r, factor), _blend(pivot, g, factor), _blend(pivot, b, factor)
    if stage == _SATURATION:
        gray = _gray(r, g, b)
        r, g, b = _blend(gray, r, factor), _blend(gray, g, factor), _blend(gray, b, factor)
    if stage == _HUE:
        r, g, b = _shift_hue(r, g, b, factor)
    if stage == _GRAYSCALE:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    if stage == _SOLARIZE:
        r, g, b = tl.where(r < 128, r, 255 - r), tl.where(g < 128, g, 255 - g), tl.where(b < 128, b, 255 - b)
    return r, g, b


@triton.jit
def _load(pixels, image, num_pixels, block: tl.constexpr):
    """Values of a block of pixels, where they are, and which of them there are."""
    pixel = tl.program_id(0) * block + tl.arange(0, block)
    there = pixel < num_pixels
    at = pixels + (image.to(tl.int64) * num_pixels + pixel) * 3
    r = tl.load(at, mask=there, other=0).to(tl.float32)
    g = tl.load(at + 1, mask=there, other=0).to(tl.float32)
    b = tl.load(at + 2, mask=there, other=0).to(tl.float32)
    return r, g, b, at, there


@triton.jit
def _sum_gray(pixels, stages, factors, sums, num_pixels, block: tl.constexpr):
    """Add up the gray values that contrast meets: those after the stages before it. Whole numbers: exact."""
    image = tl.program_id(1)
    place = 0
    # Behind the last place nothing is read.
    while tl.load(stages + image * _PLACES + place, mask=place < _PLACES, other=_CONTRAST) != _CONTRAST:
        place += 1
    if place < _PLACES:
        r, g, b, _, there = _load(pixels, image, num_pixels, block)
        for before in range(place):
            stage, factor = tl.load(stages + image * _PLACES + before), tl.load(factors + image * _PLACES + before)
            r, g, b = _apply(stage, factor, r, g, b, 0.0)
        gray = tl.where(there, _gray(r, g, b), 0.0).to(tl.int32)
        tl.atomic_add(sums + image, tl.sum(gray, axis=0))


@triton.jit
def _recolor(pixels, stages, factors, sums, num_pixels, block: tl.constexpr):
    image = tl.program_id(1)
    r, g, b, at, there = _load(pixels, image, num_pixels, block)
    pivot = tl.floor(tl.load(sums + image).to(tl.float32) / num_pixels + 0.5)
    for place in range(_PLACES):
        stage, factor = tl.load(stages + image * _PLACES + place), tl.load(factors + image * _PLACES + place)
        r, g, b = _apply(stage, factor, r, g, b, pivot)
    tl.store(at, r.to(tl.uint8), mask=there)
    tl.store(at + 1, g.to(tl.uint8), mask=there)
    tl.store(at + 2, b.to(tl.uint8), mask=there)


KERNELS: tuple[Any, ...] = (_sum_gray, _recolor)
"""What `recolor_batch` launches, in this order."""
