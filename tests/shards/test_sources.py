import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.verify import verify
from tests.shards.pictures import contents, encoded, fill, jpeg, picture


def config(*sources, out, **options):
    return PackConfig(sources=tuple(map(str, sources)), out=str(out), **{"workers": 1, "shard_samples": 100, **options})


def packed(folder):
    """{image bytes: (class name or None, source)} of a packed set."""
    shards = open_set(folder)
    found = {}
    for i in range(shards.num_shards):
        whole = shards.shard_path(i).read_bytes()
        sources = (shards.path / f"shard-{i:06d}.sources.txt").read_text().splitlines()
        for record, source in zip(shards.index(i), sources, strict=True):
            at, size = int(record["offset"]), int(record["size"])
            label = shards.class_names[record["label"]] if record["label"] >= 0 else None
            found[whole[at : at + size]] = (label, source)
    assert verify(folder) == []
    return found


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


LONG = "a-long-folder-name/" * 8 + "ünïcode"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_tars_of_class_folders(tmp_path, kind, suffix):
    path = tmp_path / f"in{suffix}"
    mode = {".tar": "w", ".tar.gz": "w:gz", ".tar.xz": "w:xz", ".tar.bz2": "w:bz2"}[suffix]
    folder = "top" if kind == tarfile.USTAR_FORMAT else LONG
    with tarfile.open(path, mode, format=kind) as tar:
        add(tar, f"{folder}/", b"", type=tarfile.DIRTYPE)
        for i in range(6):
            add(tar, f"{folder}/class{i % 2}/{i}.jpg", jpeg(i))
        add(tar, f"{folder}/class0/link.jpg", b"", type=tarfile.SYMTYPE, linkname="0.jpg")
    manifest = pack(config(path, out=tmp_path / "out"))[""]
    # The link is the image that it leads to.
    assert (manifest.num_samples, manifest.num_rejected) == (7, 0)
    expected = {jpeg(i): (f"class{i % 2}", f"{path}/{folder}/class{i % 2}/{i}.jpg") for i in range(6)}
    found = packed(tmp_path / "out")
    assert found.pop(jpeg(0)) in (("class0", f"{path}/{folder}/class0/{name}.jpg") for name in ("0", "link"))
    del expected[jpeg(0)]
    assert found == expected


def test_webdataset_shards_are_resharded_with_their_labels(tmp_path):
    path = tmp_path / "in-000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(5):
            add(tar, f"a/sample.{i}.x/{i:03d}.seg.png", encoded(picture(50 + i), "PNG"))
            add(tar, f"a/sample.{i}.x/{i:03d}.cls", str(3 * i).encode())
            add(tar, f"a/sample.{i}.x/{i:03d}.json", b"{}")
            add(tar, f"a/sample.{i}.x/{i:03d}.jpg", jpeg(i))
        add(tar, "alone.dat", jpeg(90))
        add(tar, "notes.txt", b"no image")
    with pytest.raises(ValueError, match=r"has 5 samples of several images \(jpg and seg.png: 5;.* with --members jpg"):
        pack(config(path, out=tmp_path / "out"))
    manifest = pack(config(path, out=tmp_path / "out", members=("all",)))[""]
    assert manifest.rejections == {"not an image": 1}
    assert manifest.num_samples == 11
    assert manifest.left_aside == {"cls": 5, "json": 5}
    found = packed(tmp_path / "out")
    assert {data: label for data, (label, _) in found.items() if data in map(jpeg, range(5))} == {
        jpeg(i): str(3 * i) for i in range(5)
    }
    assert found[jpeg(90)][0] is None
    assert len(manifest.class_names) == 13


def test_our_own_shards_keep_their_class_names(tmp_path):
    pack(config(fill(tmp_path / "in", 9, classes=3), out=tmp_path / "first", shard_samples=4))
    again = pack(config(tmp_path / "first", out=tmp_path / "second", shard_samples=2))[""]
    assert (again.num_rejected, again.left_aside) == (0, {"cls": 9, "of a set of shards": 11})
    first, second = packed(tmp_path / "first"), packed(tmp_path / "second")
    assert {data: label for data, (label, _) in first.items()} == {data: label for data, (label, _) in second.items()}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    with tarfile.open(folder / "in.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", jpeg(i))
    whole = (folder / "in.tar").read_bytes()
    with tarfile.open(folder / "in.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    (folder / "in.tar").write_bytes(whole[: cut % end])
    with pytest.raises(PackError, match=r"cannot be read to its end|is called an archive, but"):
        pack(config(folder / "in.tar", out=folder / "out"))


def test_zips(tmp_path):
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("class0")
        for i in range(6):
            method = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            archive.writestr(f"class{i % 2}/{i}.jpg", jpeg(i), method)
        archive.writestr("class0/lzma.jpg", jpeg(7), zipfile.ZIP_LZMA)
        archive.writestr("class0/bzip2.jpg", jpeg(8), zipfile.ZIP_BZIP2)
        archive.writestr("class1/bomb.jpg", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    manifest = pack(config(path, out=tmp_path / "out"))[""]
    assert manifest.rejections == {"not an image": 1}
    expected = {jpeg(i): (f"class{i % 2}", f"{path}/class{i % 2}/{i}.jpg") for i in range(6)}
    methods = {jpeg(7): ("class0", f"{path}/class0/lzma.jpg"), jpeg(8): ("class0", f"{path}/class0/bzip2.jpg")}
    assert packed(tmp_path / "out") == expected | methods
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PackError, match="not a whole zip"):
        pack(config(path, out=tmp_path / "again"))


@pytest.mark.parametrize(
    "content", ["a\tdog\nb\tcat\nsub/c\tdog\n", "path,label\na,dog\nb,cat\nsub/c,dog\n", "a,dog\nb,cat\nsub/c,dog"]
)
def test_text_and_csv_lists(tmp_path, content):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["a", "b", "sub/c", "unlisted"]):
        (tmp_path / name).write_bytes(jpeg(i))
    path = tmp_path / ("list.txt" if "\t" in content else "list.csv")
    path.write_text(content)
    pack(config(path, out=tmp_path / "out"))
    expected = {jpeg(0): ("dog", "a"), jpeg(1): ("cat", "b"), jpeg(2): ("dog", "sub/c")}
    assert packed(tmp_path / "out") == expected
    packed_lists = tmp_path / f"{path.name}.gz"
    packed_lists.write_bytes(gzip.compress(path.read_bytes()))
    pack(config(packed_lists, out=tmp_path / "again"))
    assert packed(tmp_path / "again") == expected


def write_three(folder):
    for i in range(3):
        (folder / f"{i} x.jpg").write_bytes(jpeg(i))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names in capitals.csv", "Filename, Label\n0 x.jpg, dog\n1 x.jpg, cat\n2 x.jpg, dog\n"),
        ("semicolons.csv", "filename;label\n0 x.jpg;dog\n1 x.jpg;cat\n2 x.jpg;dog\n"),
        ("tabs.csv", "filename\tlabel\n0 x.jpg\tdog\n1 x.jpg\tcat\n2 x.jpg\tdog\n"),
        ("utf-16.csv", "filename,label\r\n0 x.jpg,dog\r\n1 x.jpg,cat\r\n2 x.jpg,dog\r\n"),
        ("utf-16.txt", "0 x.jpg\tdog\r\n1 x.jpg\tcat\r\n2 x.jpg\tdog\r\n"),
    ],
)
def test_lists_as_spreadsheets_write_them(tmp_path, name, text):
    write_three(tmp_path)
    (tmp_path / name).write_bytes(text.encode("utf-16" if "utf-16" in name else "utf-8"))
    manifest = pack(config(tmp_path / name, out=tmp_path / "out"))[""]
    assert (manifest.num_rejected, manifest.class_names) == (0, ("cat", "dog"))
    assert {label for label, _ in packed(tmp_path / "out").values()} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("gaps.csv", "filename,label\n0 x.jpg,10.0\n1 x.jpg,\n2 x.jpg,2.0\n", ["10", "", "2"]),
        ("none.csv", "filename,label\n0 x.jpg,1\n1 x.jpg,-1\n2 x.jpg,0\n", ["1", "", "0"]),
        ("caffe.txt", "0 x.jpg 1\n1 x.jpg 0\n2 x.jpg 1\n", ["1", "0", "1"]),
    ],
)
def test_numbers_in_lists_are_classes_of_that_number(tmp_path, name, text, labels):
    write_three(tmp_path)
    (tmp_path / name).write_text(text)
    manifest = pack(config(tmp_path / name, out=tmp_path / "out"))[""]
    assert manifest.class_names == tuple(map(str, range(1 + max(int(label or -1) for label in labels))))
    found = packed(tmp_path / "out")
    assert [found[jpeg(i)][0] or "" for i in range(3)] == labels


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("id,breed\n0 x.jpg,dog\n", {}, "begins with 'id, breed': if these are names of columns"),
        ("dog,0 x.jpg\ncat,1 x.jpg\n", {}, "line 1: 'dog, 0 x.jpg' has its path in column 2"),
        ("path,label\n0 x.jpg,dog\n", {"label_column": "breed"}, "has no column 'breed': it has path, label"),
    ],
)
def test_names_of_columns_never_become_samples_or_classes(tmp_path, text, options, said):
    write_three(tmp_path)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(PackError, match=said):
        pack(config(tmp_path / "list.csv", out=tmp_path / "out", **options))


def test_a_zero_byte_in_a_list_rejects_its_line_alone(tmp_path):
    write_three(tmp_path)
    (tmp_path / "list.txt").write_text("0 x.jpg\n1\0x.jpg\n2 x.jpg\n")
    manifest = pack(config(tmp_path / "list.txt", out=tmp_path / "out", max_rejected=1.0))[""]
    assert (manifest.num_samples, manifest.rejections) == (2, {"unreadable": 1})


def test_json_lists_with_named_columns_and_numbers(tmp_path):
    lines = []
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        lines.append(json.dumps({"where": str(tmp_path / f"{i}.jpg"), "kind": i % 2 * 5, "label": "not this"}))
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, "", json.dumps({"where": "gone.jpg"})]))
    options = {"image_column": "where", "label_column": "kind", "max_rejected": 0.5}
    manifest = pack(config(tmp_path / "list.jsonl", out=tmp_path / "out", **options))[""]
    assert manifest.rejections == {"unreadable": 1}
    assert manifest.class_names == tuple("012345")
    assert [label for label, _ in packed(tmp_path / "out").values()].count("5") == 2
    (tmp_path / "bad.jsonl").write_text('{"where": 1}\n{oops\n')
    with pytest.raises(PackError, match=r"bad.jsonl, line 2: not a JSON object"):
        pack(config(tmp_path / "bad.jsonl", out=tmp_path / "bad", image_column="where"))
    with pytest.raises(PackError, match="line 1: has no path: looked for"):
        pack(config(tmp_path / "bad.jsonl", out=tmp_path / "bad"))


def table(kind, path, rows, names=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    built = pa.table(rows)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        built = built.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if kind == "parquet":
        pq.write_table(built, path, row_group_size=3, compression="zstd")
    else:
        opener = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with opener(str(path), built.schema) as writer:
            writer.write_table(built, max_chunksize=3)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_as_hugging_face_writes_them(tmp_path, kind):
    data = tmp_path / "data"
    data.mkdir()
    (data / "by_path.jpg").write_bytes(jpeg(20))
    images = [{"bytes": jpeg(i), "path": None} for i in range(8)] + [{"bytes": None, "path": "by_path.jpg"}, None]
    path = data / ("train-0.parquet" if kind == "parquet" else "train-0.arrow")
    table(kind, path, {"image": images, "label": [0, 1] * 5}, names=["cat", "dog"])
    manifest = pack(config(path, out=tmp_path / "out", workers=2, shard_samples=3, max_rejected=1.0))[""]
    assert manifest.rejections == {"empty": 1}
    assert manifest.class_names == ("cat", "dog")
    found = {data: label for data, (label, _) in packed(tmp_path / "out").items()}
    assert found == {jpeg(i): ("cat", "dog")[i % 2] for i in range(8)} | {jpeg(20): "cat"}


def test_tables_of_plain_bytes_and_the_wrong_columns(tmp_path):
    path = tmp_path / "x.parquet"
    table("parquet", path, {"photo": [jpeg(1), jpeg(2)], "kind": ["b", "a"]})
    with pytest.raises(ValueError, match=r"has columns photo, kind: name the right one with --image-column"):
        pack(config(path, out=tmp_path / "bad"))
    pack(config(path, out=tmp_path / "out", image_column="photo", label_column="kind"))
    assert {data: label for data, (label, _) in packed(tmp_path / "out").items()} == {jpeg(1): "b", jpeg(2): "a"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PackError, match="cannot be read to its end"):
        pack(config(path, out=tmp_path / "cut"))


def test_archives_and_tables_inside_a_folder_are_opened(tmp_path):
    source = fill(tmp_path / "in", 3)
    with tarfile.open(source / "more.tar", "w") as tar:
        add(tar, "3.jpg", jpeg(3))
    with zipfile.ZipFile(source / "more.zip", "w") as archive:
        archive.writestr("4.jpg", jpeg(4))
    table("parquet", source / "more.parquet", {"image": [jpeg(5)]})
    (source / "link.tar").symlink_to(tmp_path / "elsewhere.tar")
    manifest = pack(config(source, out=tmp_path / "out", max_rejected=1.0))[""]
    assert manifest.rejections == {"unreadable": 1} or manifest.rejections == {"link leaves the source": 1}
    assert set(packed(tmp_path / "out")) == {jpeg(i) for i in range(6)}


def test_sources_mix_and_bytes_do_not_depend_on_workers_or_parts(tmp_path):
    folder = fill(tmp_path / "folder", 5, classes=2)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for i in range(5, 9):
            add(tar, f"class{i % 2}/{i}.jpg", jpeg(i))
    table("parquet", tmp_path / "t.parquet", {"image": [jpeg(9), jpeg(10)], "label": ["class1", "class7"]})
    sources = (folder, tmp_path / "more.tar", tmp_path / "t.parquet")
    for name, workers in (("one", 1), ("two", 2)):
        pack(config(*sources, out=tmp_path / name, workers=workers, shard_samples=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {label for label, _ in packed(tmp_path / "one").values()} == {"class0", "class1", "class7"}


def test_names_and_bare_numbers_do_not_mix(tmp_path, capsys):
    with tarfile.open(tmp_path / "numbers.tar", "w") as tar:
        add(tar, "0.jpg", jpeg(0))
        add(tar, "0.cls", b"7")
    folder = fill(tmp_path / "in", 2, classes=2)
    with pytest.raises(PackError, match="use --labels none"):
        pack(config(folder, tmp_path / "numbers.tar", out=tmp_path / "out"))
    pack(config(folder, tmp_path / "numbers.tar", out=tmp_path / "out", labels="none"))
    (tmp_path / "what.bin").write_bytes(b"?")
    (tmp_path / "alone.jpg").write_bytes(jpeg(0))
    for source, message in (
        ("what.bin", "is not a source"),
        ("alone.jpg", "is an image: give the folder"),
        ("nowhere.tar", "does not exist"),
    ):
        assert main(["pack", str(tmp_path / source), "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    for url in ("s3://key:secret@bucket/x", "https://host/x.tar?X-Amz-Signature=secret"):
        assert main(["pack", url, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert "secret" not in error
        assert "through the environment" in error
    assert not os.path.lexists(tmp_path / "x")
