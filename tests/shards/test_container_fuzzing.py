"""Mutated, cut, spliced and joined containers: refused by name, or read with every member counted."""

import io
import tarfile
import zipfile
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.config import PackConfig
from shards.ground.errors import Rejected
from shards.packing.pack import pack
from shards.sources import Aside, Found, Input, open_source
from shards.sources.base import LabelSet
from shards.tools.verify import verify
from tests.shards.archives import END, header, member, padded, pax
from tests.shards.pictures import jpeg
from tests.shards.record_files import example, mds, tfrecord
from tests.shards.test_tar_flavors import old_sparse

IMAGES = [jpeg(i) for i in range(3)]
CONTENTS = st.sampled_from([*IMAGES, b"", b"7", b'{"label": 3}', b"text\n", IMAGES[0][:100], bytes(700)])
NAMES = st.from_regex(r"(a/|n01440764/|\./)?[0-9]{1,2}(\.(jpg|png|seg\.png|json|cls|txt))?", fullmatch=True)
GNU = b"ustar  \0"


def long_name(name, data):
    return member(b"././@LongLink", b"x" * 120 + name + b"\0", b"L", magic=GNU) + member(b"cut", data, magic=GNU)


def link(name, data):
    return header(name, 0, b"2" if len(data) % 2 else b"1", link=b"0.jpg")


def sparse(name, data):
    del name
    return old_sparse(data, [(0, len(data))], len(data) + 100)


WRITERS = (
    member,
    long_name,
    link,
    sparse,
    lambda name, data: member(name, data, magic=b""),
    lambda name, data: pax([(b"path", name + b"-pax"), (b"mtime", b"1.5")]) + member(b"short", data),
    lambda name, data: pax([(b"size", b"%d" % len(data))]) + header(name, len(data)) + padded(data),
    lambda name, data: header(name + b"/", 0, b"5"),
    lambda name, data: header(name, 0, b"6"),
    lambda name, data: pax([(b"comment", data[:20].hex().encode())], b"g"),
)
ENTRIES = st.tuples(st.sampled_from(WRITERS), NAMES.map(str.encode), CONTENTS)


def tar_of(entries):
    return b"".join(write(name, data) for write, name, data in entries) + END


def zip_of(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (write, name, data) in enumerate(entries):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)[WRITERS.index(write) % 3]
            archive.writestr(f"{number}{name.decode()}", data, method)
    return buffer.getvalue()


PLACES = st.integers(0, 1 << 20)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
        st.tuples(st.just("set"), PLACES, st.sampled_from([b"\0", b"\xff\xff\xff\xff", b"7777777777", b"-1", b" 99 "])),
        st.tuples(st.just("cut"), PLACES, st.none()),
        st.tuples(st.sampled_from(["drop", "zero", "repeat"]), PLACES, st.sampled_from([1, 13, 512, 1024])),
        st.tuples(st.just("join"), st.just(0), st.none()),
        st.tuples(st.just("splice"), PLACES, PLACES),
    ),
    max_size=3,
)


def changed(data, other, kind, place, what):
    """Data after one change; `other` is what is joined or spliced into them."""
    at = place % max(1, len(data))
    if kind in ("drop", "zero", "repeat") and what >= 512:
        at -= at % 512
    if kind == "flip":
        return data[:at] + bytes(byte ^ what for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "set":
        return data[:at] + what + data[at + len(what) :]
    if kind == "zero":
        return data[:at] + bytes(what) + data[at + what :]
    if kind == "drop":
        return data[:at] + data[at + what :]
    if kind == "repeat":
        return data[: at + what] + data[at:]
    if kind == "splice":
        return data[: at - at % 512] + other[what % len(other) // 512 * 512 :]
    return data[:at] if kind == "cut" else data + other


def mutated(data, other, mutations):
    """Data after some changes."""
    for mutation in mutations:
        data = changed(data, other, *mutation)
    return data


def listed(path, **options):
    """Every input and what is left aside; each input is read. Raises what the packer would report."""
    config = PackConfig(sources=(str(path),), out="nowhere", members=("all",), **options)
    source = open_source(str(path), config.source_options())
    items = [item for item in source.inputs(path.with_name("spool")) if not isinstance(item, Found)]
    for item in items:
        assert isinstance(item, Input | Aside)
        assert isinstance(source.describe(item.name), str)
        if isinstance(item, Input):
            assert isinstance(item.label, str | int | LabelSet | None)
            with suppress(Rejected):
                assert isinstance(source.read(item.name, item.offset, item.size), bytes)
    return items


def outcome(path, call):
    """What a call gives, or the ValueError that it raises, which names the container."""
    try:
        return call(), None
    except ValueError as refusal:
        error = refusal
    assert str(path) in str(error)
    return None, error


def reference(data):
    """How many members but folders Python's tarfile finds in all archives of a file; None: it does not read them."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
            return sum(not (info.isdir() or (info.name.endswith("/") and not info.size)) for info in tar)
    # What it runs into in a damaged extended header can be anything.
    except Exception:
        return None


def check_tar(path, entries, other, mutations):
    data = mutated(tar_of(entries), tar_of(other), mutations)
    path.write_bytes(data)
    items, error = outcome(path, lambda: listed(path, labels="none"))
    if items is None:
        assert mutations or not entries, error
    else:
        assert reference(data) in (len(items), None)


def check_other(path, whole, other, mutations):
    path.write_bytes(mutated(whole, other, mutations))
    items, error = outcome(path, lambda: listed(path, labels="none"))
    if items is None:
        assert mutations, error
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert len(items) == sum(not info.is_dir() for info in archive.infolist())


TARS = {"entries": st.lists(ENTRIES, max_size=6), "other": st.lists(ENTRIES, max_size=3), "mutations": MUTATIONS}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**TARS)
def test_a_mutated_tar_is_refused_by_name_or_every_member_counts(tmp_path_factory, entries, other, mutations):
    check_tar(tmp_path_factory.getbasetemp() / "fuzzed.tar", entries, other, mutations)


@pytest.mark.long
@settings(max_examples=8000, deadline=None, suppress_health_check=list(HealthCheck))
@given(**TARS)
def test_thousands_of_mutated_tars(tmp_path_factory, entries, other, mutations):
    check_tar(tmp_path_factory.getbasetemp() / "fuzzed.tar", entries, other, mutations)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """{name: bytes of a whole container}."""
    folder = tmp_path_factory.mktemp("wholes")
    columns = {"image": "jpeg", "label": "int"}
    samples = [{"image": data, "label": bytes(8)} for data in IMAGES]
    return {
        "fuzzed.tfrecord": tfrecord(folder / "x", [example(image=data, label=1) for data in IMAGES]).read_bytes(),
        "fuzzed.mds": mds(folder / "y.mds", columns, samples).read_bytes(),
        "fuzzed.zip": zip_of([(WRITERS[i], b"%d.jpg" % i, data) for i, data in enumerate(IMAGES)]),
    }


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["fuzzed.tfrecord", "fuzzed.mds", "fuzzed.zip"]), mutations=MUTATIONS)
def test_other_mutated_containers_are_refused_by_name_or_read(tmp_path_factory, wholes, name, mutations):
    check_other(tmp_path_factory.getbasetemp() / name, wholes[name], wholes[name], mutations)


@pytest.mark.long
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["fuzzed.tfrecord", "fuzzed.mds", "fuzzed.zip"]), mutations=MUTATIONS)
def test_thousands_of_other_mutated_containers(tmp_path_factory, wholes, name, mutations):
    check_other(tmp_path_factory.getbasetemp() / name, wholes[name], wholes[name], mutations)


def check_packed(folder, entries, other, mutations):
    data = mutated(tar_of(entries), tar_of(other), mutations)
    (folder / "fuzzed.tar").write_bytes(data)
    config = PackConfig(sources=(str(folder / "fuzzed.tar"),), out=str(folder / "out"), workers=1, members=("all",))
    manifests, _ = outcome(folder / "fuzzed.tar", lambda: pack(config))
    if manifests is None:
        assert not (folder / "out").exists()
        return
    [manifest] = manifests.values()
    assert verify(folder / "out") == []
    left_aside = sum(manifest.left_aside.values())
    assert reference(data) in (manifest.num_samples + manifest.num_rejected + left_aside, None)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(**TARS)
def test_packing_a_mutated_tar_never_loses_count(tmp_path_factory, entries, other, mutations):
    check_packed(tmp_path_factory.mktemp("fuzzed"), entries, other, mutations)


@pytest.mark.long
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(**TARS)
def test_packing_thousands_of_mutated_tars(tmp_path_factory, entries, other, mutations):
    check_packed(tmp_path_factory.mktemp("fuzzed"), entries, other, mutations)
