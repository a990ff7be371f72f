"""Kinds of common corruptions and their published strengths, as data (Hendrycks & Dietterich 2019).

Strengths are those that ImageNet-C, Tiny ImageNet-C and CIFAR-10-C were made with, for images of 224, 64 and 32 pixels:
make_imagenet_c.py, make_tinyimagenet_c.py and make_cifar_c.py in ImageNet-C/create_c of hendrycks/robustness.
"""

from math import log
from typing import Any, Literal, get_args

__all__ = [
    "ALEXNET",
    "ALEXNET_CLEAN",
    "COMMON",
    "EXTRA",
    "FAMILIES",
    "SIDES",
    "STRENGTHS",
    "Strengths",
    "strengths_for",
]

Strengths = Literal["imagenet", "tiny-imagenet", "cifar"]

SIDES = {"imagenet": 224, "tiny-imagenet": 64, "cifar": 32}
"""Height and width of the images that strengths are for."""

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
COMMON = tuple(kind for family in FAMILIES.values() for kind in family)
"""The 15 kinds of the benchmark, in its order."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four that its authors set aside for choosing hyperparameters."""

# google-research/augmix, imagenet.py, which has them from hendrycks/robustness.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Error of AlexNet on ImageNet-C by kind, averaged over the severities."""
ALEXNET_CLEAN = 1 - 0.56522
"""Error of the same AlexNet, torchvision's, on ImageNet (torchvision, AlexNet_Weights.IMAGENET1K_V1)."""


def strengths_for(size: int) -> Strengths:
    """Return the published strengths whose images are nearest in size."""
    return min(get_args(Strengths), key=lambda name: abs(log(size / SIDES[name])))


def _published(imagenet: Any, tiny: Any, cifar: Any) -> dict[str, Any]:
    return {"imagenet": imagenet, "tiny-imagenet": tiny, "cifar": cifar}


STRENGTHS: dict[str, dict[str, Any]] = {
    "gaussian_noise": _published(
        (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.08, 0.12, 0.15, 0.18), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot_noise": _published((60, 25, 12, 5, 3), (250, 100, 50, 30, 15), (500, 250, 100, 75, 50)),
    "impulse_noise": _published(
        (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.05, 0.08, 0.14), (0.01, 0.02, 0.03, 0.05, 0.07)
    ),
    "speckle_noise": _published(
        (0.15, 0.2, 0.35, 0.45, 0.6), (0.15, 0.2, 0.25, 0.3, 0.35), (0.06, 0.1, 0.12, 0.16, 0.2)
    ),
    "gaussian_blur": _published((1, 2, 3, 4, 6), (0.5, 0.75, 1, 1.25, 1.5), (0.4, 0.6, 0.7, 0.8, 1)),
    # Radius of the disk, deviation that smooths its edge.
    "defocus_blur": _published(
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    # Deviation of the blur, how far pixels are taken from, how often.
    "glass_blur": _published(
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    # Radius, deviation.
    "motion_blur": _published(
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    # End and step of the zoom.
    "zoom_blur": _published(
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    # Mean and deviation of the flakes, their zoom and threshold, radius and deviation of their motion, what is kept.
    "snow": _published(
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    # Share of the image, share of the ice.
    "frost": _published(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    # Thickness, and by what its roughness decays from scale to scale.
    "fog": _published(
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": _published((0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": _published((0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    # In pixels at the published side: reach of the displacement and deviation that smooths it, reach of the corners.
    # ImageNet-C's code takes shares of 244 pixels, for images of 224.
    "elastic_transform": _published(
        tuple(
            (244 * a, 244 * b, 244 * c)
            for a, b, c in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
        tuple(
            (64 * a, 64 * b, 64 * c)
            for a, b, c in ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02))
        ),
        tuple(
            (32 * a, 32 * b, 32 * c)
            for a, b, c in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
        ),
    ),
    "pixelate": _published((0.6, 0.5, 0.4, 0.3, 0.25), (0.9, 0.8, 0.7, 0.6, 0.5), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": _published((25, 18, 15, 10, 7), (65, 58, 50, 40, 25), (80, 65, 58, 50, 40)),
    # Mean and deviation of the drops, deviation that smooths them, threshold, weight or smoothing, water or mud.
    "spatter": _published(
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    # Factor, and what is added.
    "saturate": _published(
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
}
"""By kind and set: a strength for each severity."""
