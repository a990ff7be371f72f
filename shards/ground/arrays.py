"""Array types that more than one module names."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoded", "Indices", "LabelSets", "Pixels", "Records"]

Pixels = NDArray[np.uint8]
"""Decoded images: (H, W, 3) RGB unless it is said otherwise; the packer also has (H, W, 1) gray."""

Encoded = NDArray[np.uint8]
"""(n,) bytes of one or more encoded images."""

Indices = NDArray[np.int64]
"""(n,) dense sample numbers, places, sizes or labels."""

LabelSets = NDArray[np.int8]
"""(n, C): 1 for a class that a sample has, 0 for one that it has not, -1 for one that is not to be counted."""

Records = NDArray[np.void]
"""(n,) index records (shards.sets.record.RECORD), or rows of another table."""
