"""Which members are samples, by content and names; nothing is lost: packed + rejected + left aside = members."""

import io
import json
import tarfile
import zipfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import SourceOptions
from shards.images.sniff import is_image
from shards.sources.samples import split_name
from shards.tools.index import advice, index_folder
from tests.shards.archives import labels_of, pack_all
from tests.shards.pictures import encoded, fill, jpeg, picture
from tests.shards.test_foreign import write

SCANS = ("scan.0001.jpg", "scan.0002.jfif", "scan.0003.jpg", "scan.0004", "scan.0005.JPG_large")
MASK = encoded(picture(90, mode="L"), "PNG")


def test_numbers_between_dots_count_samples_and_content_says_what_is_an_image(tmp_path):
    files = {name: jpeg(i) for i, name in enumerate(SCANS)}
    write(tmp_path / "x.tar", files)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    (tmp_path / "x").mkdir()
    for name, data in files.items():
        (tmp_path / "x" / name).write_bytes(data)
    (tmp_path / "x.txt").write_text("".join(f"x/{name}\n" for name in SCANS))
    for name in ("x.tar", "x.zip", "x", "x.txt"):
        assert pack_all(tmp_path, tmp_path / name, out=f"{name}-out").num_samples == 5
        assert set(labels_of(tmp_path / f"{name}-out")) == set(SCANS)
    assert index_folder(str(tmp_path), workers=1).manifest.num_samples == 5


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        (b"a.b/0001.jpg", b"0001", b"jpg"),
        (b"0001.seg.png", b"0001", b"seg.png"),
        (b"scan.0001.seg.png", b"scan.0001", b"seg.png"),
        (b"scan.0004", b"scan.0004", b""),
        (b"a photo. Or two.jpg", b"a photo. Or two", b"jpg"),
        (b".hidden.jpg", b"", b"hidden.jpg"),
        (b"plain", b"plain", b""),
    ],
)
def test_keys_and_extensions(name, key, extension):
    assert split_name(name)[1:] == (key, extension)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "DDS"]
)
def test_images_are_known_by_their_first_bytes(kind):
    assert is_image(encoded(picture(1), kind)[:64])


@pytest.mark.parametrize(
    "text", [b"BM is a company in a big building by the sea", b"P5 is a gray road", b"{}", b"", b"II"]
)
def test_texts_are_no_images(text):
    assert not is_image(text)


def test_masks_beside_photos_are_refused_until_members_are_chosen(tmp_path, capsys):
    files = {}
    for i in range(4):
        files |= {f"{i:04d}.jpg": jpeg(i), f"{i:04d}.seg.png": MASK, f"{i:04d}.json": b"{}"}
    write(tmp_path / "x.tar", files)
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for source in ("x.tar", "in", "x.zip"):
        command = ["pack", str(tmp_path / source), "--workers", "1", "--out", str(tmp_path / "out")]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "has 4 samples of several images (jpg and seg.png: 4; the first is 0000.jpg)" in said
        assert "Choose with --members jpg, or take every image with --members all" in said
        assert not (tmp_path / "out").exists()
        chosen = pack_all(tmp_path, tmp_path / source, out=f"chosen-{source}", members=("JPG",))
        assert (chosen.num_inputs, chosen.left_aside) == (4, {"json": 4, "seg.png": 4})
        listed = (tmp_path / f"chosen-{source}" / "left-aside.jsonl").read_text().splitlines()
        first = {line["kind"]: (line["count"], line["first"]) for line in map(json.loads, listed)}
        assert first["seg.png"] == (4, f"{tmp_path / source}/0000.seg.png")
    every = pack_all(tmp_path, tmp_path / "x.tar", out="every", members=("all",))
    assert (every.num_inputs, every.left_aside) == (8, {"json": 4})
    with pytest.raises(ValueError, match=r"of several images"):
        index_folder(str(tmp_path), workers=1)
    assert main(["index", str(tmp_path), "--members", "jpg", "--workers", "1"]) == 0
    assert "left aside 8 (json 4, seg.png 4): see left-aside.jsonl" in capsys.readouterr().out


def test_views_of_one_sample_are_found_by_repetition_and_dots_in_names_are_not(tmp_path):
    write(tmp_path / "views.tar", {f"{i}.{side}.png": MASK for i in range(3) for side in ("left", "right")})
    with pytest.raises(ValueError, match=r"3 samples of several images \(left.png and right.png: 3;"):
        pack_all(tmp_path, tmp_path / "views.tar")
    write(tmp_path / "names.tar", {f"mr.{name}.jpg": jpeg(i) for i, name in enumerate(("jones", "miller", "smith"))})
    assert pack_all(tmp_path, tmp_path / "names.tar").num_samples == 3


def test_a_damaged_image_with_its_caption_is_one_rejection(tmp_path):
    write(
        tmp_path / "x.tar",
        {"0.jpg": b"<html>", "0.json": b"{}", "1.jpg": jpeg(1), "1.json": b"{}", "2.json": b"{}", "3.jpg": b""},
    )
    manifest = pack_all(tmp_path, tmp_path / "x.tar", max_rejected=1.0)
    assert (manifest.num_samples, manifest.rejections) == (1, {"empty": 1, "not an image": 2})
    assert manifest.left_aside == {"json": 2}


def test_a_folder_of_img2dataset_is_packed_without_its_statistics(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(2):
        files = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            caption = {"caption": "a cat", "url": "https://host/x.jpg", "key": key, "status": "success", "width": 48}
            files |= {f"{key}.jpg": jpeg(3 * shard + i), f"{key}.json": json.dumps(caption).encode()}
            files |= {f"{key}.txt": b"a cat"}
        write(source / f"{shard:05d}.tar", files)
        (source / f"{shard:05d}_stats.json").write_text('{"successes": 3}')
        (source / f"{shard:05d}.parquet").write_bytes(b"PAR1 of statistics")
    manifest = pack_all(tmp_path, source)
    assert (manifest.num_samples, manifest.num_rejected, manifest.class_names) == (6, 0, ())
    assert manifest.left_aside == {"json": 6, "of a set of shards": 4, "txt": 6}


LITTER = ("._0.jpg", ".DS_Store", "Thumbs.db", "a/desktop.ini", "__MACOSX/a/._1.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M")


def test_litter_is_counted_apart_and_never_a_class_or_a_sample(tmp_path, capsys):
    source = fill(tmp_path / "in", 4, classes=2)
    files = {name: b"\0\5\26\7" + bytes(50) for name in LITTER}
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    images = {f"class{i % 2}/{i:04d}.jpg": jpeg(i) for i in range(4)}
    write(tmp_path / "x.tar", files | images)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in (files | images).items():
            archive.writestr(name, data)
    for number, name in enumerate(("in", "x.tar", "x.zip")):
        assert main(["pack", str(tmp_path / name), "--out", str(tmp_path / f"out{number}"), "--workers", "1"]) == 0
        assert "4 images in 1 shard" in (out := capsys.readouterr().out)
        assert "2 classes" in out
        assert "left aside 6 (" in out
        assert "litter (@eaDir) 1" in out


def test_content_decides_of_what_is_called_as_litter_is_but_not_of_thumbnails(tmp_path):
    files = {"._photo.jpg": jpeg(1), ".picasa.ini": jpeg(2), "@eaDir/0.jpg": jpeg(3), "0.jpg": jpeg(0)}
    write(tmp_path / "x.tar", files)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "@eaDir").mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            (tmp_path / "in" / name).write_bytes(data)
    for source in ("x.tar", "x.zip", "in"):
        manifest = pack_all(tmp_path, tmp_path / source, out=f"{source}-out")
        assert (manifest.num_samples, manifest.left_aside) == (3, {"litter (@eaDir)": 1})


_names = st.from_regex(
    r"(a/|b\.c/)?[ab.]{0,2}[0-9]{0,2}(\.[0-9a]{1,3})?(\.(jpg|PNG|seg\.png|json|cls|txt|jfif))?", fullmatch=True
)
_contents = st.sampled_from(
    [jpeg(0), MASK, b"", b"<html>", b"{}", b"1", jpeg(1)[:60], b"\xff\xd8\xff", b'{"label": 2}']
)


@settings(max_examples=15, deadline=None)
@given(
    tars=st.lists(
        st.lists(st.tuples(_names.filter(lambda name: name and not name.endswith("/")), _contents), max_size=8),
        min_size=1,
        max_size=3,
    ),
    link=st.booleans(),
)
def test_index_accounts_for_every_member(tmp_path_factory, tars, link):
    folder = tmp_path_factory.mktemp("members")
    num_members = 0
    for number, entries in enumerate(tars):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, data in entries:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if link:
                info = tarfile.TarInfo(f"link{number}.jpg")
                info.type, info.linkname = tarfile.SYMTYPE, "nowhere"
                tar.addfile(info)
        with tarfile.open(folder / f"{number}.tar") as tar:
            num_members += len(tar.getmembers())
    indexed = index_folder(str(folder), workers=1, options=SourceOptions(members=("all",), labels="none"))
    manifest = indexed.manifest
    assert manifest.num_samples + manifest.num_rejected + sum(manifest.left_aside.values()) == num_members
    assert (
        manifest.num_inputs
        == manifest.num_samples + manifest.num_rejected
        == sum(manifest.rejections.values()) + manifest.outcomes.get("indexed", 0)
    )
    rejected = folder / "rejected.jsonl"
    lines = rejected.read_text().splitlines() if rejected.exists() else []
    assert dict(Counter(json.loads(line)["reason"] for line in lines)) == manifest.rejections
    list(advice(indexed, str(folder)))
