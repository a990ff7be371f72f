"""The photographs that scikit-image carries, in color."""

import numpy as np
from skimage import data

__all__ = ["NAMES", "photo"]

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photo(name: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.ascontiguousarray(getattr(data, name)()[:, :, :3])
