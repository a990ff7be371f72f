"""Archives and tables that cannot be read, or hold more than they say: an error by itself, never one rejection."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from shards.cli import main
from shards.ground.errors import PackError
from tests.shards.archives import labels_of, pack_all
from tests.shards.pictures import encoded, fill, jpeg, picture
from tests.shards.test_sources import packed, table
from tests.shards.test_tar_flavors import compressed, joined

SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c\0\4" + bytes(100)
UNREAD = {
    "x.7z": SEVEN_ZIP,
    "x.rar": b"Rar!\x1a\7\1\0" + bytes(100),
    "x.tar.lz4": b"\4\x22\x4d\x18" + bytes(100),
    "x.tfrecord": b"\x10\0\0\0\0\0\0\0" + bytes(100),
    "train-00000-of-00002": b"\x10\0\0\0\0\0\0\0" + bytes(100),
    "x.mds": b"\3\0\0\0" + bytes(100),
    "x.tar": b"<html>not found</html>",
    "x.tar.zst": b"",
    "x.zip": SEVEN_ZIP,
    "x.parquet": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("name", UNREAD)
def test_an_archive_that_is_not_read_is_an_error_among_any_number_of_images(tmp_path, capsys, name):
    source = fill(tmp_path / "in", 40)
    (source / name).write_bytes(UNREAD[name])
    assert main(["pack", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"{source}/{name} is " in said
    assert "would be lost silently" in said
    assert not (tmp_path / "out").exists()


def test_what_only_bears_the_name_of_an_archive_is_packed_and_what_bears_another_is_opened(tmp_path):
    source = fill(tmp_path / "in", 2)
    (source / "photo.tar").write_bytes(jpeg(10))
    (source / "photo.gz").write_bytes(encoded(picture(11), "PNG"))
    [part] = joined(range(20, 23))
    (source / "a.zip").write_bytes(part)
    (source / "b.zst").write_bytes(compressed(part, ".tar.zst"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("30.jpg", jpeg(30))
    (source / "c.tar").write_bytes(buffer.getvalue())
    manifest = pack_all(tmp_path, source)
    assert (manifest.num_samples, manifest.num_rejected) == (2 + 2 + 3 + 3 + 1, 0)


def test_an_archive_that_shows_only_when_it_is_read_fails_whatever_may_be_rejected(tmp_path, capsys):
    source = fill(tmp_path / "in", 40)
    [part] = joined(range(2))
    (source / "no-suffix").write_bytes(part)
    with tarfile.open(source / "outer.tar", "w") as tar:
        info = tarfile.TarInfo("inner.zip")
        info.size = len(SEVEN_ZIP)
        tar.addfile(info, io.BytesIO(SEVEN_ZIP))
    (source / "labels.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    assert main(["pack", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    said = capsys.readouterr()
    assert "rejected 3 of 43 (archive 2, not an image 1)" in said.out
    assert "2 archives among the inputs could not be opened" in said.err
    lines = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    reasons = {line["source"].rpartition("/")[2]: (line["reason"], line["detail"]) for line in lines}
    assert reasons["inner.zip"] == ("archive", "begins with 37 7a bc af 27 1c 00 04, as 7-Zip does")


def small_zip(names, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for i, name in enumerate(names):
            archive.writestr(name, jpeg(i))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + small_zip(["b.jpg"]), r"in front of its first member, which may be another archive"),
        (lambda data: data + joined(range(1))[0], r"10240 bytes from byte \d+ on, behind its end"),
        (lambda data: joined(range(1))[0] + data, r"the \d+ bytes from byte 10240 on are not another one"),
        (lambda data: data + b"x", r"1 bytes from byte \d+ on, behind its end"),
        (lambda data: data[:-30], r"is not a whole zip"),
        (
            lambda data: marked(data, method=9),
            r"2 members, such as 'a.jpg', cannot be read: .* \(deflate64, as Windows",
        ),
        (
            lambda data: marked(data, method=77),
            r"cannot be read: compressed by a method that is not read \(method 77\)",
        ),
        (lambda data: marked(data, flags=1), r"cannot be read: encrypted\. Unpack it"),
    ],
)
def test_zips_with_more_than_their_directory_names_or_than_can_be_read(tmp_path, change, message):
    (tmp_path / "x.zip").write_bytes(change(small_zip(["a.jpg", "c.jpg"])))
    with pytest.raises(PackError, match=message):
        pack_all(tmp_path, tmp_path / "x.zip")


def marked(data, *, method=0, flags=0):
    """A zip whose members say another method or other flags, in both places."""
    changed = bytearray(data)
    for start, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = changed.find(start)
        while place >= 0:
            changed[place + at] |= flags
            changed[place + at + 2] = method
            place = changed.find(start, place + 1)
    return bytes(changed)


def test_a_zip_that_unpacks_itself_and_a_comment_are_right(tmp_path):
    data = small_zip(["a.jpg", "c.jpg"], zipfile.ZIP_DEFLATED)
    (tmp_path / "x.zip").write_bytes(b"#!/bin/sh\nexit\n" + data)
    assert pack_all(tmp_path, tmp_path / "x.zip").num_samples == 2
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.comment = b"two photos"
    assert pack_all(tmp_path, tmp_path / "x.zip", out="again").num_samples == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_rejected(tmp_path, method):
    data = bytearray(small_zip(["a.jpg", "c.jpg"], method))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo("a.jpg")
    middle = info.header_offset + 30 + len("a.jpg") + info.compress_size // 2
    data[middle : middle + 40] = bytes(range(100, 140))
    (tmp_path / "x.zip").write_bytes(data)
    manifest = pack_all(tmp_path, tmp_path / "x.zip", max_rejected=1.0)
    assert (manifest.num_samples, manifest.num_rejected) == (1, 1)


def arrow_rows(i):
    return {"image": [jpeg(2 * i), jpeg(2 * i + 1)], "label": ["a", "b"]}


@pytest.mark.parametrize("kinds", [("stream", "stream"), ("file", "file"), ("file", "stream"), ("stream", "file")])
def test_joined_arrow_files_are_read_to_the_end(tmp_path, kinds):
    data = b""
    for i, kind in enumerate((*kinds, kinds[0])):
        table(kind, tmp_path / f"{i}.arrow", arrow_rows(i))
        data += (tmp_path / f"{i}.arrow").read_bytes()
    (tmp_path / "all.arrow").write_bytes(data)
    assert pack_all(tmp_path, tmp_path / "all.arrow").num_samples == 6
    assert set(labels_of(tmp_path / "out")) == {f"row {i}" for i in range(6)}
    assert set(packed(tmp_path / "out")) == {jpeg(i) for i in range(6)}
    for more in (b"something else", data[:200]):
        (tmp_path / "all.arrow").write_bytes(data + more)
        with pytest.raises(PackError, match=r"all.arrow cannot be read to its end"):
            pack_all(tmp_path, tmp_path / "all.arrow", out="more")


def test_joined_arrow_files_of_other_columns_and_joined_parquet_are_refused(tmp_path):
    table("file", tmp_path / "0.arrow", arrow_rows(0))
    table("file", tmp_path / "1.arrow", {"image": [jpeg(2)]})
    table("parquet", tmp_path / "0.parquet", arrow_rows(0))
    (tmp_path / "x.arrow").write_bytes((tmp_path / "0.arrow").read_bytes() + (tmp_path / "1.arrow").read_bytes())
    (tmp_path / "x.parquet").write_bytes(2 * (tmp_path / "0.parquet").read_bytes())
    with pytest.raises(PackError, match=r"x.arrow is several Arrow files joined, whose columns differ"):
        pack_all(tmp_path, tmp_path / "x.arrow")
    with pytest.raises(PackError, match=r"is several Parquet files joined"):
        pack_all(tmp_path, tmp_path / "x.parquet")


def test_a_set_that_datasets_saved_is_packed_without_its_descriptions(tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "in" / "train" / name).write_text("{}")
    table("stream", tmp_path / "in" / "train" / "data-00000-of-00001.arrow", arrow_rows(0))
    manifest = pack_all(tmp_path, tmp_path / "in")
    assert (manifest.num_samples, manifest.num_rejected) == (2, 0)
    assert manifest.left_aside == {"of a set of shards": 3}
