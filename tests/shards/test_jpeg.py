import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.images.jpeg import JpegError, is_jpeg, parse_jpeg
from tests.shards.pictures import encoded, jpeg, picture


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    progressive=st.booleans(),
    orientation=st.integers(0, 9),
    big_endian=st.booleans(),
)
def test_headers_agree_with_pillow(width, height, mode, progressive, orientation, big_endian):
    exif = Image.Exif()
    exif.endian = ">" if big_endian else "<"
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    data = encoded(picture(0, width, height, mode), progressive=progressive, exif=exif)
    header = parse_jpeg(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (header.width, header.height) == image.size
        assert header.num_components == len(image.getbands())
        assert header.is_baseline == ("progressive" not in image.info)
        expected = image.getexif().get(0x0112)
    assert header.orientation == (expected if expected in range(1, 9) else 1)
    assert header.is_ycbcr_or_gray == (mode != "CMYK")


def test_rgb_jpegs_are_not_taken_for_ycbcr():
    header = parse_jpeg(encoded(picture(), keep_rgb=True))
    assert header.num_components == 3
    assert not header.is_ycbcr_or_gray


def test_junk_between_segments_is_skipped():
    data = jpeg()
    junk = data[:2] + data[2:20] + b"\x00\x12\xff\x00\xff\xff" + data[20:]
    assert data[20:21] == b"\xff"
    assert parse_jpeg(junk) == parse_jpeg(data)._replace(scan_at=parse_jpeg(data).scan_at + 6)


@given(data=st.data())
def test_any_cut_or_damaged_header_is_an_error_or_a_header(data):
    whole = jpeg()
    cut = data.draw(st.integers(3, len(whole)))
    damaged = bytearray(whole[:cut])
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(3, cut - 1)) if cut > 3 else 2] = data.draw(st.integers(0, 255))
    try:
        header = parse_jpeg(bytes(damaged))
    except JpegError:
        return
    assert header.width > 0
    assert header.height > 0


def test_long_runs_of_stuffed_zeros_end():
    with pytest.raises(JpegError):
        parse_jpeg(b"\xff\xd8" + b"\xff\x00" * 100_000)


def test_a_size_of_zero_is_refused():
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 7] = b"\0\0"
    with pytest.raises(JpegError, match="48 x 0"):
        parse_jpeg(bytes(data))


def test_other_formats_are_no_jpegs():
    assert is_jpeg(jpeg())
    assert not is_jpeg(encoded(picture(), "PNG"))
    assert not is_jpeg(b"")
