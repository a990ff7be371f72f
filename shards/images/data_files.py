"""Formats that deep learning libraries keep many images in, by their first bytes."""

import re
from itertools import pairwise

from shards.ground.digests import masked_crc32c

__all__ = ["CONVERTED", "HOLD_IMAGES", "data_file"]

HOLD_IMAGES = frozenset({"LMDB", "MXNet's RecordIO", "LitData", "FFCV's beton", "HDF5", "NumPy's .npz", "MNIST's IDX"})
"""Formats that are not read, whose files mostly hold many images."""

CONVERTED = HOLD_IMAGES | {"NumPy's .npy", "a pickle", "a file of PyTorch", "MATLAB"}
"""Formats that are not read: docs/packing.md has commands that turn them into what is."""

_STARTS = {
    b"\x0a\x23\xd7\xce": "MXNet's RecordIO",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x93NUMPY": "NumPy's .npy",
    b"MATLAB 5.0 MAT-file": "MATLAB",
}
_LMDB = b"\xde\xc0\xef\xbe"
_PICKLE = re.compile(rb"\x80(?:[\x02\x03][\x28\x5d\x63\x7d]|[\x04\x05]\x95)")
_IDX = re.compile(rb"\0\0\x08[\x01-\x04]\0", re.DOTALL)
_MEMBER_OF_PYTORCH = re.compile(rb"[^/]+/(?:data\.pkl|\.format_version|\.storage_alignment|byteorder|version)")
_MOST_CONFIG_BYTES = 1 << 16
_SHOWN_BYTES = 512


def data_file(head: bytes) -> str | None:
    """Return the name of the format that a file's first bytes (shards.images.sniff.SNIFFED_BYTES) are of, or None."""
    if len(head) >= 12 and int.from_bytes(head[8:12], "little") == masked_crc32c(head[:8]):
        return "TFRecord"
    if head[16:20] == _LMDB:
        return "LMDB"
    if head[:4] == b"PK\3\4":
        return _in_zip(head)
    if _PICKLE.match(head):
        return "a pickle"
    if _IDX.match(head):
        return "MNIST's IDX"
    found = next((name for start, name in _STARTS.items() if head.startswith(start)), None)
    return found or _with_offsets(head) or ("FFCV's beton" if _is_beton(head) else None)


def _in_zip(head: bytes) -> str | None:
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return "NumPy's .npz"
    return "a file of PyTorch" if _MEMBER_OF_PYTORCH.fullmatch(name) else None


def _with_offsets(head: bytes) -> str | None:
    """Recognize what begins with a number of samples and the offset of each and of the end: MDS and LitData."""
    words = [int.from_bytes(head[i : i + 4], "little") for i in range(0, len(head) - 3, 4)]
    if len(words) < 3 or not words[0]:
        return None
    offsets = words[1 : 2 + words[0]]
    directory = 4 * (words[0] + 2)
    if any(first > second for first, second in pairwise(offsets)):
        return None
    if offsets[0] == directory:
        return "LitData"
    is_mds = directory < offsets[0] <= directory + _MOST_CONFIG_BYTES
    # Where the configuration can be seen, it is JSON.
    begin = head[directory : directory + 2]
    return "MDS" if is_mds and (begin == b'{"' or directory >= len(head) >= _SHOWN_BYTES) else None


def _is_beton(head: bytes) -> bool:
    """Whether a header says FFCV's version 2, some fields, and pages of a size that is a power of two."""
    num_fields, page = int.from_bytes(head[2:4], "little"), int.from_bytes(head[4:8], "little")
    return head[:2] == b"\2\0" and 0 < num_fields <= 64 and 1 << 12 <= page <= 1 << 32 and not page & (page - 1)
