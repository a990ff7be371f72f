import io
import json

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shards.cli import main
from shards.config import PackConfig
from shards.images.jpeg import ENGINE_KINDS, parse_jpeg
from shards.packing.pack import pack
from shards.sets import ShardSet, open_set
from shards.sets.beton import BetonSet
from shards.sets.manifest import Manifest
from shards.tools.index import index_folder
from tests.shards.pictures import encoded, fill, picture

PIXELS = np.array(picture())
ALL_KINDS = {
    "4:4:4": lambda: simplejpeg.encode_jpeg(PIXELS, colorsubsampling="444"),
    "4:2:2": lambda: simplejpeg.encode_jpeg(PIXELS, colorsubsampling="422"),
    "4:2:0": lambda: simplejpeg.encode_jpeg(PIXELS, colorsubsampling="420"),
    "4:4:0": lambda: simplejpeg.encode_jpeg(PIXELS, colorsubsampling="440"),
    "4:1:1": lambda: simplejpeg.encode_jpeg(PIXELS, colorsubsampling="411"),
    "gray": lambda: encoded(picture(mode="L")),
    "progressive": lambda: encoded(picture(), progressive=True),
    "not YCbCr": lambda: encoded(picture(), keep_rgb=True),
    "several scans": lambda: in_several_scans(encoded(picture())),
}


def in_several_scans(data: bytes) -> bytes:
    """Only the header: its first scan has one component of three."""
    at = data.index(b"\xff\xda")
    return data[: at + 4] + b"\x01" + data[at + 5 :]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_kind_is_read_from_the_header(kind):
    header = parse_jpeg(ALL_KINDS[kind]())
    assert header.kind == kind


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
def test_sampling_factors_are_those_that_pillow_reads(kind):
    data = ALL_KINDS[kind]()
    layers = Image.open(io.BytesIO(data)).layer
    assert [(factor >> 4, factor & 15) for factor in parse_jpeg(data).sampling] == [layer[1:3] for layer in layers]


def test_engines_take_what_nvjpeg_says():
    assert set(ALL_KINDS) - ENGINE_KINDS == {"4:1:1", "progressive", "not YCbCr", "several scans"}


@pytest.fixture
def packed(tmp_path):
    source = fill(tmp_path / "in", 5)
    for name in ("4:4:4", "4:1:1", "gray"):
        (source / name.replace(":", "")).write_bytes(ALL_KINDS[name]())
    (source / "progressive.jpg").write_bytes(ALL_KINDS["progressive"]())
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), shard_samples=3, workers=1))
    return tmp_path / "out"


def without_kinds(folder):
    """The manifest as earlier versions wrote it."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for part in (values, *values["shards"]):
        del part["jpegs"]
    path.write_text(json.dumps(values))
    return folder


def kinds_of(shards: ShardSet) -> list[str]:
    kinds = []
    for number in range(shards.num_shards):
        file = shards.open_shard(number)
        for record in shards.index(number):
            data = np.empty(int(record["size"]), dtype=np.uint8)
            file.read_into(data, int(record["offset"]))
            kinds.append(parse_jpeg(data.tobytes()).kind)
    return kinds


def test_packing_counts_the_kinds_of_what_it_wrote(packed):
    manifest = Manifest.read(packed)
    written = kinds_of(open_set(packed))
    assert manifest.jpegs == {kind: written.count(kind) for kind in sorted(set(written))}
    assert manifest.jpegs["4:1:1"] == 1
    assert manifest.engine_share == 1 - 1 / 9
    assert [sum(shard.jpegs.values()) for shard in manifest.shards] == [shard.num_samples for shard in manifest.shards]


def test_a_set_without_kinds_opens_and_index_notes_them(packed, capsys):
    complete = (packed / "manifest.json").read_bytes()
    manifest = Manifest.read(without_kinds(packed))
    assert (manifest.jpegs, manifest.engine_share) == ({}, None)
    assert main(["inspect", str(packed)]) == 0
    assert "not known whether they can decode 9 samples" in capsys.readouterr().out
    assert main(["index", str(packed), "--workers", "1"]) == 0
    assert "JPEG engines can decode 88.9% of the samples (4:1:1 1, " in capsys.readouterr().out
    assert (packed / "manifest.json").read_bytes() == complete
    assert main(["verify", str(packed), "--workers", "1"]) == 0
    # There is nothing more to note.
    assert main(["index", str(packed)]) == 2


def test_a_beton_gets_its_kinds_from_its_shards(packed, tmp_path, capsys):
    file = tmp_path / "set.beton"
    assert main(["beton", str(without_kinds(packed)), "--out", str(file), "--workers", "1"]) == 0
    assert BetonSet.open(file).manifest.engine_share is None
    before = file.read_bytes()
    capsys.readouterr()
    assert main(["index", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file}: a .beton has its index and cannot be changed" in error
    assert error.count("\n") == 1
    assert file.read_bytes() == before
    # As it says.
    assert main(["index", str(packed), "--workers", "1"]) == 0
    file.unlink()
    assert main(["beton", str(packed), "--out", str(file), "--workers", "1"]) == 0
    assert BetonSet.open(file).manifest.engine_share == 1 - 1 / 9


def test_a_long_header_is_read_whole(packed, tmp_path):
    source = tmp_path / "long"
    source.mkdir()
    (source / "a.jpg").write_bytes(encoded(picture(), icc_profile=bytes(200_000), subsampling=0))
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "packed"), workers=1))
    assert main(["index", str(without_kinds(tmp_path / "packed")), "--workers", "1"]) == 0
    assert Manifest.read(tmp_path / "packed").jpegs == {"4:4:4": 1}


def test_several_sets_add_up_and_one_without_kinds_makes_the_share_unknown(packed, tmp_path):
    pack(PackConfig(sources=(str(fill(tmp_path / "more", 3)),), out=str(tmp_path / "other"), workers=1))
    both = open_set(f"{packed},{tmp_path / 'other'}").manifest
    assert sum(both.jpegs.values()) == both.num_samples == 12
    assert both.engine_share == 1 - 1 / 12
    without_kinds(tmp_path / "other")
    assert open_set(f"{packed},{tmp_path / 'other'}").manifest.engine_share is None


def test_tars_of_others_are_counted_too(packed):
    expected = Manifest.read(packed).jpegs
    for path in packed.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    assert index_folder(str(packed), workers=1).manifest.jpegs == expected
