"""Signs of damage in a JPEG, looked for without decoding it and without a library."""

import re
from functools import lru_cache

__all__ = ["looks_whole"]

# In coded data a zero follows every 0xFF; restart markers may stand between its intervals (ITU T.81, B.1.1.2, B.1.1.5).
_ANY_OTHER_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_EOI = b"\xff\xd9"
# A block that a disk or a download lost is a run of zeros. Two in a row of every 256th byte are rare elsewhere.
_STRIDE = 256
_FEW_ZEROS, _RUN = bytes(2), bytes(512)
_SOF0, _DHT, _SOS, _DQT, _DRI, _APP0, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xFE
_KNOWN = frozenset({_SOF0, _DHT, _SOS, _DQT, _DRI, _COM, *range(_APP0, _APP0 + 16)})
_JFIF = b"JFIF\0"
_FACTORS = frozenset(16 * across + down for across in (1, 2, 3, 4) for down in (1, 2, 3, 4))


def looks_whole(data: bytes, scan_at: int) -> bool:
    """Return whether a baseline JPEG of a single scan shows no sign of damage; if not, only decoding tells what it is.

    A whole one has segments that follow each other without a gap up to its scan, with tables that are ones and that
    its components name; an end marker, no other marker before it, and no long run of zeros.

    Args:
        data: the file.
        scan_at: where the header of its first scan begins (JpegHeader.scan_at).
    """
    start = scan_at + int.from_bytes(data[scan_at : scan_at + 2], "big")
    marker = _ANY_OTHER_MARKER.search(data, start)
    if marker is None or marker[0] != _EOI or not _has_sound_header(data, scan_at):
        return False
    return _FEW_ZEROS not in data[start : marker.start() : _STRIDE] or data.find(_RUN, start, marker.start()) < 0


def _has_sound_header(data: bytes, scan_at: int) -> bool:
    tables: set[int] = set()
    frame = b""
    at = 2
    while True:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            return at + 2 == scan_at and _names_tables(frame, data[at + 4 : end], tables)
        if marker not in _KNOWN or end < at + 4 or end > scan_at:
            return False
        # Decoders warn of any other major version.
        if marker == _APP0 and data[at + 4 : at + 9] == _JFIF and data[at + 9] != 1:
            return False
        if marker in (_DHT, _DQT):
            found = (_huffman_tables if marker == _DHT else _quantization_tables)(data[at + 4 : end])
            if found is None:
                return False
            tables |= found
        elif marker == _SOF0:
            frame = data[at + 4 : end]
        at = end


def _names_tables(frame: bytes, scan: bytes, tables: set[int]) -> bool:
    """Return whether a frame and its scan have the same components, and name tables that are there."""
    num = frame[5] if len(frame) > 5 else 0
    if not num or len(frame) != 6 + 3 * num or len(scan) != 4 + 2 * num or scan[0] != num:
        return False
    named = {0x200 | frame[at] for at in range(8, len(frame), 3)}
    for at in range(2, 1 + 2 * num, 2):
        named |= {scan[at] >> 4, 0x10 | scan[at] & 15}
    return frame[6::3] == scan[1 : 1 + 2 * num : 2] and _FACTORS.issuperset(frame[7::3]) and named <= tables


@lru_cache(maxsize=256)  # most files have the same ones
def _huffman_tables(segment: bytes) -> frozenset[int] | None:
    """Return the tables in a segment, as 16 times the class plus the number; None where one is not sound (B.2.4.2)."""
    found: set[int] = set()
    while segment:
        counts = segment[1:17]
        symbols = segment[17 : 17 + sum(counts)]
        if segment[0] not in (0x00, 0x01, 0x02, 0x03, 0x10, 0x11, 0x12, 0x13) or len(counts) < 16:
            return None
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            # The code of all ones is never used (annex C).
            if count and code >= (1 << bits):
                return None
        if len(symbols) < sum(counts) or (segment[0] < 0x10 and symbols and max(symbols) > 15):
            return None
        found.add(segment[0])
        segment = segment[17 + sum(counts) :]
    return frozenset(found)


@lru_cache(maxsize=1024)
def _quantization_tables(segment: bytes) -> frozenset[int] | None:
    """Return the tables in a segment, as 512 plus the number; None where one is not sound (B.2.4.1)."""
    found: set[int] = set()
    while segment:
        size = 65 + 64 * (segment[0] >> 4)
        if segment[0] >> 4 > 1 or segment[0] & 15 > 3 or len(segment) < size:
            return None
        found.add(0x200 | segment[0] & 15)
        segment = segment[size:]
    return frozenset(found)
