import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.storage.tar import BLOCK, EndOfTar, TarError, TarWriter, make_header, parse_header

_names = st.binary(min_size=1, max_size=100).filter(lambda name: b"\0" not in name)


@given(name=st.from_regex(r"[a-z0-9]{1,40}\.[a-z]{1,9}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_headers_are_those_of_pythons_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    expected = info.tobuf(tarfile.USTAR_FORMAT)
    assert make_header(name.encode(), size) == expected


@given(name=_names, size=st.integers(0, 8**11 - 1))
def test_headers_are_read_back(name, size):
    member = parse_header(make_header(name, size))
    assert (member.name, member.size, member.type) == (name, size, b"0")


@given(at=st.integers(0, BLOCK - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_noticed(at, bit):
    block = bytearray(make_header(b"000001.jpg", 1234))
    block[at] ^= 1 << bit
    try:
        member = parse_header(bytes(block))
    except TarError:
        return
    # A space and a NUL both end a number: the checksum's own terminators carry no information.
    assert 148 <= at < 156
    assert member == parse_header(make_header(b"000001.jpg", 1234))


def test_the_end_and_a_cut_header_are_told_apart():
    with pytest.raises(EndOfTar):
        parse_header(bytes(BLOCK))
    with pytest.raises(TarError, match="cut after 100"):
        parse_header(bytes(100))


@given(sizes=st.lists(st.integers(0, 2000), max_size=30))
def test_what_is_written_is_what_tarfile_reads(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    writer = TarWriter(fd)
    members = [(f"{i}.bin", bytes([i]) * size) for i, size in enumerate(sizes)]
    offsets = [writer.add(name.encode(), data) for name, data in members]
    writer.finish()
    os.close(fd)
    whole = path.read_bytes()
    assert len(whole) == writer.num_bytes
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        read = [(m.name, tar.extractfile(m).read()) for m in tar]
    assert read == members
    assert [whole[at : at + len(data)] for at, (_, data) in zip(offsets, members, strict=True)] == [
        d for _, d in members
    ]


def test_many_buffers_and_partial_writes_arrive_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    writev = os.writev
    # A signal or a full pipe may cut any write short.
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [memoryview(buffers[0])[:700]]))
    writer = TarWriter(fd)
    for i in range(600):
        writer.add(b"%d" % i, bytes([i % 256]) * (i % 5 * 300))
    writer.finish()
    os.close(fd)
    with tarfile.open(path) as tar:
        assert [tar.extractfile(m).read() for m in tar] == [bytes([i % 256]) * (i % 5 * 300) for i in range(600)]
