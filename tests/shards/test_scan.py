import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.images.scan import looks_whole

HEADER = b"\0\x08\1\1\0\0\x3f\0"


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
    assert looks_whole(b"before" + HEADER + coded, len(b"before")) == by_the_words(coded)


@given(before=st.integers(0, 2000), run=st.integers(0, 1200), after=st.integers(0, 2000))
def test_a_run_of_zeros_is_a_sign(before, run, after):
    whole = looks_whole(HEADER + b"a" * before + bytes(run) + b"a" * after + b"\xff\xd9" + bytes(2000), 0)
    if run >= 768:
        assert not whole
    if run < 512:
        assert whole


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\x08", b"\xff\xd9"])
def test_what_ends_within_its_header_is_not_whole(data):
    assert not looks_whole(data, 0)
