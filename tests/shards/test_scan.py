import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.images.jpeg import JpegError, parse_jpeg
from shards.images.libraries import decode_jpeg
from shards.images.scan import looks_whole
from tests.shards.pictures import encoded, jpeg, picture

WHOLE = jpeg(1, optimize=True)
SCAN_AT = parse_jpeg(WHOLE).scan_at
HEADER = WHOLE[: SCAN_AT + 2 + 10]


def by_the_words(coded: bytes) -> bool:
    """What `looks_whole` promises, one byte after the other."""
    at = 0
    while at + 1 < len(coded):
        if coded[at] != 0xFF:
            at += 1
        elif coded[at + 1] == 0xD9:
            return True
        elif coded[at + 1] == 0 or 0xD0 <= coded[at + 1] <= 0xD7:
            at += 2
        else:
            return False
    return False


PARTS = st.sampled_from(
    [b"\xff\0", b"\xff\xd0", b"\xff\xd7", b"\xff\xd9", b"\xff\xc4", b"\xff\xff", b"\xff", b"a", b"\0"]
)


@given(st.lists(PARTS, max_size=12).map(b"".join))
def test_markers_are_those_of_a_scan_and_an_end(coded):
    assert looks_whole(HEADER + coded, SCAN_AT) == by_the_words(coded)


@given(before=st.integers(0, 2000), run=st.integers(0, 1200), after=st.integers(0, 2000))
def test_a_run_of_zeros_is_a_sign(before, run, after):
    whole = looks_whole(HEADER + b"a" * before + bytes(run) + b"a" * after + b"\xff\xd9" + bytes(2000), SCAN_AT)
    if run >= 768:
        assert not whole
    if run < 512:
        assert whole


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\x08", b"\xff\xd9"])
def test_what_ends_within_its_header_is_not_whole(data):
    assert not looks_whole(data, 0)


@pytest.mark.parametrize(
    "data",
    [jpeg(1), WHOLE, encoded(picture(3, mode="L")), encoded(picture(2), subsampling=0, restart_marker_rows=1)],
)
def test_a_header_that_looks_whole_is_one_that_decoders_can_use(data):
    end = parse_jpeg(data).scan_at + 10
    num_noticed = 0
    assert looks_whole(data, parse_jpeg(data).scan_at)
    for at in range(2, end):
        for flip in (0x01, 0x10, 0xFF):
            spoiled = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            try:
                header = parse_jpeg(spoiled)
            except JpegError:
                continue
            # What is not YCbCr or gray, or turned, is decoded in any case.
            if not (header.is_baseline and header.is_ycbcr_or_gray and header.has_usual_sampling):
                continue
            if looks_whole(spoiled, header.scan_at):
                decode_jpeg(spoiled, gray=header.num_components == 1, strict=False)
            else:
                num_noticed += 1
    assert num_noticed > 100
