"""TFRecord files and MDS shards: read directly, alone or in a folder; every record is packed or rejected."""

import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.ground.errors import PackError
from shards.images.sniff import container
from shards.storage.stores import SeekableFile
from shards.storage.tfrecord import RecordError, features, records
from tests.shards.archives import labels_of, pack_all
from tests.shards.pictures import fill, jpeg, picture
from tests.shards.record_files import example, mds, tfrecord
from tests.shards.test_sources import packed
from tests.shards.test_tar_flavors import compressed

SLIM = {"image__height": 40, "image__width": 48, "image__colorspace": b"RGB", "image__object__bbox__xmin": [0.5, 0.25]}


def slim(i):
    """A record as TensorFlow's own scripts write ImageNet."""
    names = {"image__class__synset": b"n%08d" % (i % 2), "image__class__text": b"cat", "image__class__label": 1 + i % 2}
    return example(image__encoded=jpeg(i), image__filename=b"%d.JPEG" % i, **names, **SLIM)


def test_records_as_imagenet_has_them_alone_in_a_folder_and_joined(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    tfrecord(source / "train-00000-of-00002", [slim(i) for i in range(3)])
    tfrecord(source / "train-00001-of-00002", [slim(i) for i in range(3, 6)])
    expected = {jpeg(i): f"n{i % 2:08d}" for i in range(6)}
    for number, name in enumerate(("in", "in/train-00001-of-00002", "joined")):
        (tmp_path / "joined").write_bytes(b"".join(p.read_bytes() for p in sorted(source.iterdir())))
        manifest = pack_all(tmp_path, tmp_path / name, out=f"out{number}", workers=2, shard_samples=2)
        assert (manifest.num_rejected, manifest.class_names) == (0, ("n00000000", "n00000001"))
        found = {data: label for data, (label, _) in packed(tmp_path / f"out{number}").items()}
        assert found == {data: label for data, label in expected.items() if number != 1 or data in map(jpeg, (3, 4, 5))}
    assert labels_of(tmp_path / "out1")["record 0"] == "n00000001"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_records_of_tensorflow_datasets_have_their_names_of_classes(tmp_path, suffix):
    source = tmp_path / "in"
    source.mkdir()
    plain = tfrecord(tmp_path / "plain", [example(image=jpeg(i), label=i % 3, id=b"x") for i in range(4)]).read_bytes()
    packers = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: compressed(data, ".tar.zst")}
    (source / f"pets-train.tfrecord-00000-of-00001{suffix}").write_bytes(packers[suffix](plain))
    (source / "label.labels.txt").write_text("cat\ndog\nowl\n")
    for name in ("features.json", "dataset_info.json"):
        (source / name).write_text("{}")
    manifest = pack_all(tmp_path, source)
    assert (manifest.num_samples, manifest.num_rejected) == (4, 0)
    assert manifest.class_names == (("cat", "dog", "owl"))
    assert labels_of(tmp_path / "out")["record 2"] == "owl"


def test_fields_are_chosen_or_asked_for(tmp_path):
    path = tfrecord(tmp_path / "x.tfrecord", [example(photo=jpeg(i), kind=[i % 2, 2], score=0.5) for i in range(3)])
    with pytest.raises(ValueError, match=r"has columns .*kind.*: name the right one with --image-column"):
        pack_all(tmp_path, path)
    manifest = pack_all(tmp_path, path, image_column="photo", label_column="kind")
    assert (manifest.num_samples, manifest.has_label_sets) == (3, True)
    with pytest.raises(ValueError, match=r"field score: 0.5 is not a class; name that of labels with --label-column"):
        pack_all(tmp_path, path, out="score", image_column="photo", label_column="score")
    assert pack_all(tmp_path, path, out="none", image_column="photo", labels="none").class_names == ()


def test_a_record_without_an_image_or_damaged_is_one_rejection(tmp_path):
    messages = [
        example(image=jpeg(0), label=0),
        example(label=1),
        example(image=[jpeg(1), jpeg(2)], label=1),
        example(image=b"no image", label=0),
        example(image=jpeg(3), label=1),
        b"\xff\xff\xff",
    ]
    path = tfrecord(tmp_path / "x.tfrecord", messages)
    data = bytearray(path.read_bytes())
    data[data.index(jpeg(3)) + 100] ^= 1
    path.write_bytes(data)
    manifest = pack_all(tmp_path, path, max_rejected=1.0)
    assert (manifest.num_inputs, manifest.num_samples) == (6, 1)
    lines = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    reasons = {line["source"].rpartition("/")[2]: line["detail"] for line in lines}
    assert reasons["record 1"] == "the record has no image in image"
    assert reasons["record 2"] == "the record has 2 images in image"
    assert reasons["record 4"] == "does not match its checksum in the TFRecord file"
    assert reasons["record 5"].startswith("is not a message of protobuf")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), flip=st.none() | st.tuples(st.integers(0, 10_000), st.integers(1, 255)))
def test_cut_and_damaged_records_are_found_wherever_that_is(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.getbasetemp()
    whole = tfrecord(folder / "whole", [slim(i) for i in range(2)]).read_bytes()
    data = bytearray(whole[: cut % len(whole)])
    if flip is not None and data:
        data[flip[0] % len(data)] ^= flip[1]
    size = len(whole) // 2
    reader = SeekableFile(_Bytes(bytes(data)), 1 << 12)
    if len(data) in (0, size) and flip is None:
        assert len(list(records(reader))) == len(data) // size
        return
    problems = 0
    try:
        for at, count in records(reader):
            try:
                features(reader.read_at, at, at + count)
            except RecordError:
                problems += 1
    except RecordError:
        problems += 1
    assert problems > 0 or flip is not None


class _Bytes:
    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read(self, start, count):
        return self.data[start : start + count]


@given(
    values=st.dictionaries(
        st.text(max_size=5),
        st.lists(st.binary(max_size=20), min_size=1, max_size=3)
        | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3)
        | st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_features_are_those_that_protobuf_wrote(values):
    message = example(**{name.replace("/", "__"): value for name, value in values.items()})
    reader = SeekableFile(_Bytes(b"xyz" + message + b"crc"), 16)
    found = features(reader.read_at, 3, 3 + len(message))
    names = {name.replace("__", "/"): value for name, value in values.items()}
    assert {name: feature.values(reader.read_at) for name, feature in found.items()} == names


@pytest.mark.parametrize("compress", [None, ".tar.zst", gzip.compress])
def test_mds_shards(tmp_path, compress):
    source = tmp_path / "in"
    source.mkdir()
    suffix = {None: "", ".tar.zst": ".zstd"}.get(compress, ".gz")
    compressor = (lambda data: compressed(data, compress)) if isinstance(compress, str) else compress
    encodings = {"image": "jpeg", "label": "int", "caption": "str", "score": "float32"}
    samples = [
        {"image": jpeg(i), "label": (i % 3).to_bytes(8, "little"), "caption": b"a cat" * i, "score": bytes(4)}
        for i in range(200)
    ]
    for number in range(2):
        part = samples[:150] if number == 0 else samples[150:]
        mds(source / f"shard.0000{number}.mds{suffix}", encodings, part, compressor)
    manifest = pack_all(tmp_path, source, shard_samples=60)
    assert (manifest.num_samples, manifest.num_rejected) == (200, 0)
    assert (manifest.left_aside, manifest.class_names) == ({"of a set of shards": 1}, ("0", "1", "2"))
    found = {data: label for data, (label, _) in packed(tmp_path / "out").items()}
    assert found == {jpeg(i): str(i % 3) for i in range(200)}


def test_mds_columns_of_other_encodings(tmp_path):
    raw = np.array([48, 40, 3], np.uint32).tobytes() + b"RGB" + picture(3).tobytes()
    path = mds(tmp_path / "raw.mds", {"x": "pil", "y": "uint16"}, [{"x": raw, "y": b"\1\0"}, {"x": raw, "y": b"\2\0"}])
    manifest = pack_all(tmp_path, path, label_column="y", quality=100)
    assert (manifest.num_samples, manifest.class_names) == (2, ("0", "1", "2"))
    for data in packed(tmp_path / "out"):
        with Image.open(io.BytesIO(data)) as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(picture(3))).mean() < 2
    other = {"x": raw.replace(b"RGB", b"HSV"), "y": b"\1\0"}
    path = mds(tmp_path / "odd.mds", {"x": "pil", "y": "uint16"}, [other])
    assert pack_all(tmp_path, path, out="odd", max_rejected=1.0).rejections == {"damaged": 1}
    columns = {"left": "jpeg", "right": "png", "label": "pkl"}
    path = mds(tmp_path / "two.mds", columns, [{"left": jpeg(0), "right": jpeg(1), "label": b"\x80"}])
    with pytest.raises(ValueError, match=r"has columns label, left, right: name the right one with --image-column"):
        pack_all(tmp_path, path, out="two")
    with pytest.raises(ValueError, match=r"field label: its encoding is pkl; name that of labels"):
        pack_all(tmp_path, path, out="two", image_column="left")
    assert pack_all(tmp_path, path, out="two", image_column="left", labels="none").num_samples == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"is cut: it ends at byte \d+ of \d+"),
        (lambda data: data + data, r"goes on for \d+ bytes behind its last sample, at byte \d+"),
        (lambda data: data[:30], r"do not fit into 30 bytes|is called an archive, but|is cut"),
        (lambda data: data.replace(b"column_sizes", b"column_sixes"), r"its configuration cannot be read"),
        (lambda data: data.replace(b'"jpeg"', b'"j\xff\xff\xff"'), r"its configuration cannot be read"),
        (lambda data: data.replace(len(jpeg(0)).to_bytes(4, "little"), b"\1\0\0\0"), r"columns do not fill it"),
    ],
)
def test_mds_shards_that_are_not_whole_are_refused(tmp_path, change, message):
    path = mds(tmp_path / "x.mds", {"image": "jpeg", "label": "int"}, [{"image": jpeg(0), "label": bytes(8)}])
    path.write_bytes(change(path.read_bytes()))
    source = fill(tmp_path / "in", 1)
    path.rename(source / "x.mds")
    with pytest.raises(PackError, match=message):
        pack_all(tmp_path, source)


def test_records_are_known_by_their_first_bytes(tmp_path):
    assert container(tfrecord(tmp_path / "x", [slim(0)]).read_bytes()[:512]) == "TFRecord"
    many = mds(tmp_path / "y", {"image": "bytes"}, [{"image": b"x"}] * 1000)
    assert container(many.read_bytes()[:512]) == "MDS"
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((2, 3, 3)))
    assert container(buffer.getvalue()[:512]) == "NumPy's .npz"
