"""Tars of every flavor and member type, several in one file, and bytes behind the end: alone, in a folder, by index."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.ground.errors import PackError
from shards.storage.stores import open_bytes
from shards.storage.tar import TarError
from shards.storage.tar_reading import members, read_member, tar_reader
from shards.storage.unpacking import COMPRESSIONS, UnpackError, unpack
from shards.tools.index import index_folder
from tests.shards.archives import END, header, member, pack_all, padded, pax
from tests.shards.pictures import jpeg
from tests.shards.test_sources import add

GNU = b"ustar  \0"
LONG = b"folder-with-a-long-name/" * 6 + b"0.jpg"


def written(tmp_path, data):
    path = tmp_path / "in.tar"
    path.write_bytes(data)
    return path


def read_all(path):
    """{name: content, or why there is none} of a tar's members."""
    file = open_bytes(str(path))
    entries = list(members(tar_reader(file, False)))
    assert len({entry.name for entry in entries}) == len(entries)
    return {
        entry.name: read_member(file, entry.offset, entry.size) if entry.is_file else entry.problem for entry in entries
    }


def old_sparse(data, pieces, size):
    """GNU's old format: four pieces in the header, 21 in each block behind it."""
    fields = [b"%011o\0%011o\0" % piece for piece in pieces]
    rest = bytes(41) + b"".join(fields[:4]).ljust(96, b"\0") + (b"\1" if fields[4:] else b"\0") + b"%011o\0" % size
    blocks = b"".join(
        (b"".join(fields[i : i + 21]).ljust(504, b"\0") + (b"\1" if fields[i + 21 :] else b"\0")).ljust(512, b"\0")
        for i in range(4, len(fields), 21)
    )
    return header(b"sparse.jpg", len(data), b"S", magic=GNU, rest=rest) + blocks + padded(data)


def sparse(data, kind):
    """The same image with a hole of 1,000 bytes behind its first 100, in each of the four formats that GNU tar has."""
    size = len(data) + 1000
    pieces = [(0, 100), (1100, len(data) - 100)]
    if kind == "old":
        return old_sparse(data, pieces, size)
    if kind == "0.0":
        fields = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"2")]
        for offset, count in pieces:
            fields += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % count)]
        return pax(fields) + member(b"sparse.jpg", data)
    if kind == "0.1":
        fields = [
            (b"GNU.sparse.size", b"%d" % size),
            (b"GNU.sparse.map", b",".join(b"%d,%d" % piece for piece in pieces)),
            (b"GNU.sparse.name", b"sparse.jpg"),
        ]
        return pax(fields) + member(b"GNUSparseFile.1/sparse.jpg", data)
    mapped = b"2\n" + b"".join(b"%d\n%d\n" % piece for piece in pieces)
    fields = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"sparse.jpg")]
    fields.append((b"GNU.sparse.realsize", b"%d" % size))
    return pax(fields) + member(b"GNUSparseFile.1/sparse.jpg", padded(mapped) + data)


@pytest.mark.parametrize("kind", ["old", "0.0", "0.1", "1.0"])
def test_files_with_holes_are_read_whole(tmp_path, kind):
    image = jpeg(3)
    path = written(tmp_path, member(b"a.jpg", jpeg(1)) + sparse(image, kind) + member(b"z.jpg", jpeg(2)) + END)
    assert read_all(path) == {
        b"a.jpg": jpeg(1),
        b"sparse.jpg": image[:100] + bytes(1000) + image[100:],
        b"z.jpg": jpeg(2),
    }


def test_an_old_map_of_many_pieces_and_damaged_maps(tmp_path):
    data = bytes(range(1, 61)) * 10
    pieces = [(100 * i, 20) for i in range(30)]
    whole = b"".join(data[20 * i : 20 * i + 20] + bytes(80) for i in range(30))
    path = written(tmp_path, old_sparse(data, pieces, 3000) + END)
    assert read_all(path) == {b"sparse.jpg": whole}
    for size, some in ((1000, pieces), (3000, [(0, 20), (2990, 20)]), (1 << 32, pieces)):
        path.write_bytes(old_sparse(data, some, size) + END)
        os.utime(path, (size, size))
        with pytest.raises(TarError, match=r"a damaged map of a sparse file at byte 0"):
            read_all(path)
    assert pack_all(tmp_path, path, max_rejected=1.0).rejections == {"damaged": 1}


FLAVORS = {
    "v7": member(b"0.jpg", jpeg(0), b"\0", magic=b""),
    "old checksum": member(b"\xe9.jpg", jpeg(0), magic=b"", signed=True),
    "ustar": member(b"0.jpg", jpeg(0), rest=b"a/folder"),
    "GNU": member(b"0.jpg", jpeg(0), magic=GNU, rest=b"00000000001\x0000000000002\0"),
    "GNU long name": member(b"././@LongLink", LONG + b"\0", b"L", magic=GNU) + member(LONG[:100], jpeg(0), magic=GNU),
    "star": member(
        b"0.jpg", jpeg(0), rest=b"a/folder".ljust(131, b"\0") + b"00000000001 00000000002 " + bytes(8) + b"tar\0"
    ),
    "PAX": pax([(b"path", LONG), (b"comment", b"a = b\nc"), (b"mtime", b"1.5")]) + member(b"x", jpeg(0)),
    "PAX size": pax([(b"size", b"%d" % len(jpeg(0)))]) + header(b"0.jpg", 0) + padded(jpeg(0)),
    "Solaris": pax([(b"path", LONG)], b"X") + member(b"x", jpeg(0)),
    "global header": pax([(b"comment", b"0123abcd")], b"g") + member(b"0.jpg", jpeg(0)),
    "base 256": header(b"0.jpg", b"\x80" + len(jpeg(0)).to_bytes(11, "big"), magic=GNU) + padded(jpeg(0)),
    "spaces in numbers": header(b"0.jpg", b"%11o " % len(jpeg(0))) + padded(jpeg(0)),
    "contiguous": member(b"0.jpg", jpeg(0), b"7"),
    "unknown type": member(b"0.jpg", jpeg(0), b"Z"),
    "volume label": header(b"backup", 0, b"V", magic=GNU) + member(b"0.jpg", jpeg(0)),
    "access control": member(b"acl", b"user::rwx", b"A") + member(b"0.jpg", jpeg(0)),
    "folder with a size": header(b"a/", 4096, b"5") + member(b"a/0.jpg", jpeg(0)),
    "incremental": member(b"a/", b"Y0.jpg\0\0", b"D", magic=GNU) + member(b"a/0.jpg", jpeg(0)),
}


def both(flavor):
    """Two tars joined: one of a flavor, one of the seventh edition."""
    one = FLAVORS[flavor] + member(b"1.jpg", jpeg(1))
    two = member(b"2.jpg", jpeg(2), b"\0", magic=b"") + member(b"3.jpg", jpeg(3))
    return one + bytes(10240 - 512) + two + END


@pytest.mark.parametrize("flavor", FLAVORS)
def test_flavors_are_read(tmp_path, flavor):
    found = read_all(written(tmp_path, both(flavor)))
    assert list(found.values()) == [jpeg(i) for i in range(4)]
    assert next(iter(found)) in (b"0.jpg", b"\xe9.jpg", b"a/folder/0.jpg", b"a/0.jpg", LONG)


def test_flavors_are_packed_from_a_folder_and_indexed(tmp_path):
    (tmp_path / "in").mkdir()
    for number, flavor in enumerate(FLAVORS):
        (tmp_path / "in" / f"{number:02d}.tar").write_bytes(both(flavor))
    for found in (
        pack_all(tmp_path, tmp_path / "in", labels="none"),
        index_folder(str(tmp_path / "in"), workers=1).manifest,
    ):
        assert (found.num_samples, found.num_rejected, found.left_aside) == (4 * len(FLAVORS), 0, {})


def test_links_are_what_they_lead_to_and_devices_are_rejected(tmp_path):
    data = b"".join(
        (
            header(b"first.jpg", 0, b"2", link=b"a/0.jpg"),
            member(b"a/0.jpg", jpeg(0)),
            header(b"a/hard.jpg", len(jpeg(0)), b"1", link=b"a/0.jpg"),
            member(b"a/with-data.jpg", jpeg(0), b"1", link=b"a/0.jpg"),
            header(b"b/up.jpg", 0, b"2", link=b"../a/hard.jpg"),
            header(b"out.jpg", 0, b"2", link=b"/etc/passwd"),
            header(b"folder.jpg", 0, b"2", link=b"a"),
            header(b"round.jpg", 0, b"2", link=b"trip.jpg"),
            header(b"trip.jpg", 0, b"2", link=b"round.jpg"),
            header(b"device", 0, b"3"),
            header(b"pipe", 0, b"6"),
            header(b"rest.jpg", 0, b"M"),
            pax([(b"linkpath", b"a/0.jpg")]) + header(b"long.jpg", 0, b"1", link=b"x"),
            END,
        )
    )
    found = read_all(written(tmp_path, data))
    images = {name for name, content in found.items() if content == jpeg(0)}
    assert images == {b"first.jpg", b"a/0.jpg", b"a/hard.jpg", b"a/with-data.jpg", b"b/up.jpg", b"long.jpg"}
    assert found[b"out.jpg"] == "a link to /etc/passwd, which is not a file in the archive"
    assert found[b"round.jpg"] == found[b"trip.jpg"] == "a link that leads round in a circle"
    manifest = pack_all(tmp_path, tmp_path / "in.tar", labels="none", max_rejected=1.0)
    assert (manifest.num_samples, manifest.rejections) == (6, {"not a file": 7})


@pytest.mark.parametrize("flavor", ["v7", "ustar", "oldgnu", "gnu", "pax"])
def test_what_gnu_tar_writes(tmp_path, flavor):
    source = tmp_path / "in" / "class"
    source.mkdir(parents=True)
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(jpeg(i))
    os.link(source / "0.jpg", source / "hard.jpg")
    (source / "soft.jpg").symlink_to("1.jpg")
    with (source / "holes.jpg").open("wb") as file:
        file.write(jpeg(4))
        file.truncate(1 << 20)
    command = [
        "tar",
        f"--format={flavor}",
        "--create",
        "--sparse",
        "--file",
        str(tmp_path / "x.tar"),
        "-C",
        str(tmp_path),
    ]
    if flavor in ("v7", "ustar"):
        command.remove("--sparse")
    subprocess.run([*command, "in"], check=True)
    found = {name.decode().rpartition("/")[2]: data for name, data in read_all(tmp_path / "x.tar").items()}
    assert found == {path.name: path.read_bytes() for path in source.iterdir()}


def joined(*groups):
    parts = []
    for group in groups:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in group:
                add(tar, f"{i}.jpg", jpeg(i))
        parts.append(buffer.getvalue())
    return parts


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
def test_archives_joined_by_cat_are_all_read(tmp_path, suffix):
    parts = joined(range(2), range(2, 6), range(6, 7))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"x{suffix}").write_bytes(b"".join(compressed(part, suffix) for part in parts))
    for number, source in enumerate((tmp_path / "in" / f"x{suffix}", tmp_path / "in")):
        manifest = pack_all(tmp_path, source, out=f"out{number}")
        assert (manifest.num_samples, manifest.num_rejected) == (7, 0)


def compressed(data, suffix):
    if suffix == ".tar.zst":
        zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
        return zstd.compress(data)
    return {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("behind", [jpeg(7), bytes(5000) + b"\1"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
def test_bytes_that_are_no_archive_are_refused_by_their_place(tmp_path, suffix, behind):
    [part] = joined(range(2))
    whole = compressed(part, suffix)
    (tmp_path / f"x{suffix}").write_bytes(whole + behind)
    at = len(whole) + len(behind) - len(behind.lstrip(b"\0"))
    place = f"the {len(behind.lstrip(bytes(1)))} bytes from byte {at} on" if suffix == ".tar" else f"from byte {at} on"
    with pytest.raises(PackError, match=rf"x{suffix} cannot be read to its end .*{place}"):
        pack_all(tmp_path, tmp_path / f"x{suffix}")
    if suffix == ".tar":
        with pytest.raises(PackError, match=rf"x.tar cannot be read to its end .*{place}"):
            index_folder(str(tmp_path), workers=1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(COMPRESSIONS)),
    parts=st.lists(st.binary(max_size=300), min_size=1, max_size=3),
    padding=st.integers(0, 40),
    cut=st.integers(0, 10_000),
)
def test_streams_are_unpacked_whole_or_refused(tmp_path_factory, kind, parts, padding, cut):
    suffix = {"gzip": ".tar.gz", "bzip2": ".tar.bz2", "xz": ".tar.xz", "zstd": ".tar.zst"}[kind]
    packed = [compressed(part, suffix) for part in parts]
    path = tmp_path_factory.mktemp("streams") / "x"
    path.write_bytes(b"".join(packed) + bytes(padding))
    target = io.BytesIO()
    unpack(open_bytes(str(path)), kind, target)
    assert target.getvalue() == b"".join(parts)
    ends = {sum(map(len, packed[: i + 1])) for i in range(len(parts))}
    shorter = cut % len(b"".join(packed))
    if shorter not in ends:
        path.with_name("cut").write_bytes(b"".join(packed)[:shorter])
        with pytest.raises(UnpackError):
            unpack(open_bytes(str(path.with_name("cut"))), kind, io.BytesIO())


def test_a_compressed_tar_under_any_name_is_one_and_index_says_what_to_do(tmp_path):
    [part] = joined(range(3))
    for number, name in enumerate(("plain.tar", "x.gz", "y.tgz", "z.tar")):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        (folder / name).write_bytes(part if name == "plain.tar" else gzip.compress(part))
        assert pack_all(tmp_path, folder, out=f"out{number}").num_samples == 3
    with pytest.raises(PackError, match=r"z.tar is compressed: .* Pack it with"):
        index_folder(str(tmp_path / "in3"), workers=1)
