"""JPEG headers: what a file says about itself, read from its markers without decoding anything."""

import re
from typing import NamedTuple

__all__ = ["ENGINE_KINDS", "JpegError", "JpegHeader", "is_jpeg", "parse_jpeg", "with_sound_scan", "without_stray_bytes"]

_SOI = b"\xff\xd8\xff"
_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_ORIENTATION_TAG = 0x0112
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>\s*)([1-8])\b")

# Luminance samples for one of chrominance, horizontally and vertically.
_SUBSAMPLINGS: dict[tuple[float, float], str] = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
    (4, 2): "4:1:0",
}

_USUAL_SAMPLINGS = frozenset(bytes((luminance, 0x11, 0x11)) for luminance in (0x11, 0x21, 0x22, 0x12, 0x41))

ENGINE_KINDS = frozenset({"4:4:4", "4:2:2", "4:2:0", "4:4:0", "gray"})
"""Kinds of JPEG that a GPU's JPEG engine decodes: baseline in one scan, neither 4:1:0 nor 4:1:1 (nvjpeg.h,
NVJPEG_BACKEND_HARDWARE)."""


class JpegError(ValueError):
    """The markers are not those of a JPEG."""


class JpegHeader(NamedTuple):
    """The facts that decide whether an image can be stored as it is."""

    width: int
    height: int
    num_components: int
    precision: int
    """Bits a component."""
    sof: int
    """Low byte of the frame marker: 0xC0 is baseline, 0xC2 progressive."""
    orientation: int
    """Orientation by EXIF, else by XMP, 1 to 8; 1 is upright, and stands for none."""
    color_transform: int
    """Adobe's transform: 0 none (RGB or CMYK), 1 YCbCr, 2 YCCK; -1 where there is no Adobe marker."""
    has_rgb_ids: bool
    """The components are called R, G, B, which libjpeg takes for RGB."""
    sampling: bytes
    """Sampling factors of each component: 16 times the horizontal one, plus the vertical one."""
    num_scan_components: int
    """Components in the first scan."""
    scan_at: int
    """Where the first scan's header begins."""

    @property
    def has_usual_sampling(self) -> bool:
        """Whether its sampling factors are those of 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 or gray as is usual."""
        return self.num_components == 1 or self.sampling in _USUAL_SAMPLINGS

    @property
    def is_baseline(self) -> bool:
        """Sequential, Huffman-coded, eight bits."""
        return self.sof == 0xC0 and self.precision == 8

    @property
    def is_progressive(self) -> bool:
        """Progressive, Huffman-coded, eight bits."""
        return self.sof == 0xC2 and self.precision == 8

    @property
    def is_ycbcr_or_gray(self) -> bool:
        """Stored in the color spaces that every JPEG decoder takes alike."""
        if self.num_components == 1:
            return True
        is_rgb = self.color_transform == 0 or (self.color_transform < 0 and self.has_rgb_ids)
        return self.num_components == 3 and not is_rgb

    @property
    def kind(self) -> str:
        """One of ENGINE_KINDS, or a word or two for what a JPEG engine does not take."""
        if not self.is_baseline:
            return "progressive" if self.is_progressive else "not baseline"
        if not self.is_ycbcr_or_gray:
            return "not YCbCr"
        if self.num_scan_components < self.num_components:
            return "several scans"
        if self.num_components == 1:
            return "gray"
        luminance, blue, red = self.sampling
        ratio = ((luminance >> 4) / max(1, blue >> 4), (luminance & 15) / max(1, blue & 15))
        return _SUBSAMPLINGS.get(ratio, "other subsampling") if blue == red else "other subsampling"


def is_jpeg(data: bytes) -> bool:
    """Return whether the first bytes are a JPEG's."""
    return data[:3] == _SOI


def parse_jpeg(data: bytes) -> JpegHeader:
    """Read the markers up to the first scan (ITU T.81, annex B).

    Raises:
        JpegError: cut short, no frame before the scan, or a frame without a size.
    """
    position, orientation, in_xmp, transform = 2, 1, 1, -1
    frame: tuple[int, int, int, int, int, bool, bytes] | None = None
    try:
        while True:
            marker, position = _next_marker(data, position)
            if marker in _STANDALONE:
                continue
            if marker == 0xD9:
                raise JpegError("ends before its first scan")
            length = (data[position] << 8) | data[position + 1]
            start, end = position + 2, position + length
            if marker == 0xDA:
                num_scan_components = data[start]
                break
            if marker in _SOF_MARKERS and frame is None:
                frame = _parse_frame(data, start, marker)
            elif marker == 0xE1 and orientation == 1 and data[start : start + 6] == b"Exif\0\0":
                orientation = _exif_orientation(data[start + 6 : end])
            elif marker == 0xE1 and data[start : start + len(_XMP)] == _XMP:
                in_xmp = _xmp_orientation(data[start:end])
            elif marker == 0xEE and length >= 14 and data[start : start + 5] == b"Adobe":
                transform = data[start + 11]
            position = end
    except IndexError:
        raise JpegError("cut short inside its header") from None
    if frame is None:
        raise JpegError("has no frame before its first scan")
    width, height, num_components, precision, sof, has_rgb_ids, sampling = frame
    if not width or not height:
        raise JpegError(f"says that it is {width} x {height} pixels")
    return JpegHeader(
        width,
        height,
        num_components,
        precision,
        sof,
        orientation if orientation != 1 else in_xmp,
        transform,
        has_rgb_ids,
        sampling,
        num_scan_components,
        position,
    )


def with_sound_scan(data: bytes, header: JpegHeader) -> bytes:
    """Return a JPEG whose first scan says that it has all coefficients, where it is sequential and says otherwise.

    Some phones write other numbers there, which mean something for progressive ones alone (ITU T.81, B.2.3).
    """
    at = header.scan_at + 3 + 2 * header.num_scan_components
    if header.sof not in (0xC0, 0xC1) or data[at : at + 3] == b"\0\x3f\0":
        return data
    return data[:at] + b"\0\x3f\0" + data[at + 3 :]


def without_stray_bytes(data: bytes) -> bytes:
    """Return a JPEG that `parse_jpeg` takes, without what lies between the segments of its header.

    Raises:
        JpegError: a segment is shorter than its length field.
    """
    pieces, position = [data[:2]], 2
    while True:
        end = position
        marker, position = _next_marker(data, position)
        start = position - 2
        # Any number of 0xFF may stand before a marker.
        while start > end and data[start - 1] == 0xFF:
            start -= 1
        if marker == 0xDA:
            return b"".join((*pieces, data[start:]))
        if marker not in _STANDALONE:
            length = (data[position] << 8) | data[position + 1]
            if length < 2:
                raise JpegError(f"has a segment of {length} bytes in its header")
            position += length
            pieces.append(data[start:position])


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    while True:
        # Some writers leave junk between segments; decoders skip to the next 0xFF, and over runs of it.
        if data[position] != 0xFF:
            position = data.find(b"\xff", position)
            if position < 0:
                raise JpegError("cut short inside its header")
        while data[position] == 0xFF:
            position += 1
        # A stuffed zero is not a marker: it belongs to junk.
        if data[position]:
            return data[position], position + 1


def _parse_frame(data: bytes, start: int, marker: int) -> tuple[int, int, int, int, int, bool, bytes]:
    height = (data[start + 1] << 8) | data[start + 2]
    width = (data[start + 3] << 8) | data[start + 4]
    num_components = data[start + 5]
    end = start + 6 + 3 * num_components
    has_rgb_ids = bytes(data[start + 6 : end : 3]) == b"RGB"
    return width, height, num_components, data[start], marker, has_rgb_ids, bytes(data[start + 7 : end : 3])


def _xmp_orientation(packet: bytes) -> int:
    """Return the orientation from an XMP packet, written as an attribute or an element; 1 where there is none."""
    found = _XMP_ORIENTATION.search(packet)
    return int(found[1]) if found is not None else 1


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation from an EXIF block; 1 where it says nothing sensible."""
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    order = "little" if tiff[:2] == b"II" else "big"
    ifd = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[ifd : ifd + 2], order)
    for entry in range(ifd + 2, min(ifd + 2 + 12 * count, len(tiff) - 11), 12):
        if int.from_bytes(tiff[entry : entry + 2], order) == _ORIENTATION_TAG:
            value = int.from_bytes(tiff[entry + 8 : entry + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1
