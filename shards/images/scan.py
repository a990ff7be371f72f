"""Signs of damage in the scan of a JPEG, looked for without decoding it."""

import re

__all__ = ["looks_whole"]

# In coded data a zero follows every 0xFF; restart markers may stand between its intervals (ITU T.81, B.1.1.2, B.1.1.5).
_ANY_OTHER_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_EOI = b"\xff\xd9"
# A block that a disk or a download lost is a run of zeros. Two in a row of every 256th byte are rare elsewhere.
_STRIDE = 256
_FEW_ZEROS, _RUN = bytes(2), bytes(512)


def looks_whole(data: bytes, scan_at: int) -> bool:
    """Return whether a JPEG of a single scan shows no sign of damage; if not, only decoding tells what it is.

    A whole one has an end marker, no other marker before it, and no long run of zeros.

    Args:
        data: the file.
        scan_at: where the header of its first scan begins (JpegHeader.scan_at).
    """
    start = scan_at + int.from_bytes(data[scan_at : scan_at + 2], "big")
    marker = _ANY_OTHER_MARKER.search(data, start)
    if marker is None or marker[0] != _EOI:
        return False
    return _FEW_ZEROS not in data[start : marker.start() : _STRIDE] or data.find(_RUN, start, marker.start()) < 0
