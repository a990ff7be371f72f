"""Records of the index beside each shard: one for each sample."""

import io
from enum import IntFlag
from functools import lru_cache

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from shards.ground.arrays import Indices

__all__ = ["ANNOTATED", "INDEXED", "RECORD", "REFUSED", "Flag", "flag_name", "index_bytes", "npy_header"]

RECORD = np.dtype(
    [
        ("position", "<u8"),  # planned position: the key in the tar
        ("offset", "<u8"),  # of the image's bytes inside the tar
        ("size", "<u4"),  # of the image in bytes
        ("width", "<u4"),  # pixels, as stored
        ("height", "<u4"),
        ("label", "<i4"),  # -1: none
        ("crc32c", "<u4"),  # of the image's bytes
        ("mean_rgb", "u1", (3,)),
        ("flags", "u1"),  # Flag
    ]
)
"""One sample of a shard; 40 bytes."""


@lru_cache(maxsize=128)
def npy_header(num_records: int) -> bytes:
    """Return the bytes before the records in a .npy file of that many."""
    buffer = io.BytesIO()
    write_array_header_1_0(buffer, {"descr": dtype_to_descr(RECORD), "fortran_order": False, "shape": (num_records,)})
    return buffer.getvalue()


def index_bytes(num_records: Indices) -> Indices:
    """Return the sizes of .npy files of so many records each, (n,) both."""
    # A header is as long as its number has digits, or longer.
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    headers = np.array([len(npy_header(int(power) - 1)) for power in powers], dtype=np.int64)
    return headers[np.searchsorted(powers, num_records, side="right")] + num_records * RECORD.itemsize


INDEXED = "indexed"
"""In a manifest's settings: others wrote the tars, and `make-shards index` described them."""


ANNOTATED = "annotations"
"""In a manifest's settings: a benchmark was packed with its annotations, and its images as they are."""


class Flag(IntFlag):
    """What a reader should know about a sample. Others than HAS_MEAN_RGB are in sets that kept images as they are."""

    HAS_MEAN_RGB = 1
    NEEDS_ORIENTATION = 2
    """EXIF asks for a turn or a mirror."""
    NOT_BASELINE = 4
    """A progressive or otherwise unusual JPEG: decoders take a slower path."""
    NOT_RGB = 8
    """CMYK or another color space."""
    NOT_JPEG = 16
    DAMAGED = 32
    """Nothing could make sense of its header."""


REFUSED = Flag.NEEDS_ORIENTATION | Flag.NOT_RGB | Flag.NOT_JPEG | Flag.DAMAGED
"""Training would see such a sample sideways, in wrong colors or not at all: packing fixes or rejects it."""


def flag_name(flag: Flag) -> str:
    """Return the name of one flag in tallies, such as `not jpeg`."""
    return (flag.name or "").lower().replace("_", " ")
