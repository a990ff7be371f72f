"""Local copies of what cannot be read where it is."""

from pathlib import Path

from shards.images.sniff import SNIFFED_BYTES, container
from shards.storage.stores import open_bytes
from shards.storage.unpacking import COMPRESSIONS, unpack

__all__ = ["spooled"]


def spooled(root: str, spool: Path) -> Path | None:
    """Unpack a compressed file to a local one, and return that; None where it is not compressed.

    Raises:
        UnpackError: damaged, or cut.
        OSError: it cannot be read.
    """
    raw = open_bytes(root)
    kind = container(raw.read(0, SNIFFED_BYTES))
    if kind not in COMPRESSIONS:
        return None
    with spool.open("wb") as target:
        unpack(raw, kind, target)
    return spool
