import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.cli import main
from shards.config import PackConfig
from shards.ground.progress import ProgressBars
from shards.packing.pack import pack
from shards.sets import ShardSet, open_set
from shards.sets.beton import METADATA, METADATA_AT, PAGE_BYTES, BetonSet
from shards.tools.beton import _place, verify_beton, write_beton
from tests.shards.pictures import contents, encoded, fill, picture

QUIET = ProgressBars(enabled=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beton")
    source = fill(folder / "in", 11, classes=2)
    pack(PackConfig(sources=(str(source),), out=str(folder / "out"), shard_samples=4, workers=1))
    return folder / "out"


@pytest.fixture(scope="module")
def beton(packed):
    write_beton(packed, packed.parent / "set.beton", workers=2, progress=QUIET)
    return packed.parent / "set.beton"


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "shards")


def image_bytes(shards: ShardSet) -> list[bytes]:
    found = []
    for number in range(shards.num_shards):
        whole = Path(shards.shard_name(number)).read_bytes()
        found += [whole[int(r["offset"]) : int(r["offset"]) + int(r["size"])] for r in shards.index(number)]
    return found


def test_it_is_the_same_set_under_the_same_numbers(packed, beton):
    shards, ours = open_set(packed), open_set(beton)
    assert isinstance(ours, BetonSet)
    assert ours.manifest == shards.manifest
    assert ours.shard_sizes.tolist() == [4, 4, 3]
    assert image_bytes(ours) == image_bytes(shards)
    for number in range(3):
        for name in ("position", "size", "width", "height", "label", "crc32c", "mean_rgb", "flags"):
            assert np.array_equal(ours.index(number)[name], shards.index(number)[name])
    again = pickle.loads(pickle.dumps(ours))
    assert np.array_equal(again.records, ours.records)


def test_the_bytes_do_not_depend_on_the_number_of_workers(packed, beton, tmp_path):
    write_beton(packed, tmp_path / "one.beton", workers=1, progress=QUIET)
    assert (tmp_path / "one.beton").read_bytes() == beton.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["one.beton"]


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=60), after=st.integers(0, 500))
def test_images_follow_each_other_and_none_crosses_a_page(sizes, after):
    sizes = np.array(sizes)
    begins = _place(sizes, 128, after)
    ends = begins + sizes
    assert begins[0] >= after
    assert (begins[1:] >= ends[:-1]).all()
    assert (begins // 128 == (ends - 1) // 128).all()
    # A page is left only when the next image does not fit.
    moved = begins[1:] != ends[:-1]
    assert (ends[:-1] % 128 + sizes[1:] > 128)[moved & (ends[:-1] % 128 > 0)].all()


def test_an_image_larger_than_ffcvs_page_gets_larger_pages(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2600, 2600, 3), dtype=np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "large.jpg").write_bytes(encoded(Image.fromarray(noise), "JPEG", quality=100))
    assert (folder / "large.jpg").stat().st_size > PAGE_BYTES
    pack(PackConfig(sources=(str(folder),), out=str(tmp_path / "out"), workers=1))
    written = write_beton(tmp_path / "out", tmp_path / "x.beton", workers=1, progress=QUIET)
    with (tmp_path / "x.beton").open("rb") as file:
        assert int.from_bytes(file.read(8)[4:], "little") == 2 * PAGE_BYTES
    assert image_bytes(written) == [(folder / "large.jpg").read_bytes()]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_that_is_read_is_found(beton, data):
    shards = BetonSet.open(beton)
    records = np.array(shards.records)
    image = data.draw(st.integers(0, records.size - 1))
    offset, size = int(records[image]["offset"]), int(records[image]["size"])
    tables_end = METADATA_AT + records.size * METADATA.itemsize
    runs = [(0, tables_end), (offset, offset + size), (shards.layout.records_at, shards.layout.num_bytes)]
    begin, end = data.draw(st.sampled_from(runs))
    at = data.draw(st.integers(begin, end - 1))
    whole = beton.read_bytes()
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    beton.write_bytes(damaged)
    try:
        problems = [str(problem) for problem in verify_beton(beton)]
    except ValueError as error:
        problems = [str(error)]
    finally:
        beton.write_bytes(whole)
    assert problems
    if begin == offset:
        [problem] = problems
        assert problem.startswith(f"set.beton, sample {records[image]['position']}: its bytes have changed")


def test_what_is_no_whole_beton_is_refused(packed, beton, tmp_path):
    whole = beton.read_bytes()
    path = tmp_path / "x.beton"
    with pytest.raises(ValueError, match="does not exist: `make-shards beton SHARDS --out"):
        open_set(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="it was cut; write or copy it again"):
        open_set(path)
    path.write_bytes(b"not a beton at all" * 1000)
    with pytest.raises(ValueError, match=r"is not a \.beton"):
        open_set(path)
    # As FFCV's own writer leaves it: nothing in the arguments of the image's field.
    path.write_bytes(whole[:41] + bytes(1024) + whole[41 + 1024 :])
    with pytest.raises(ValueError, match="lacks the index that order and augmentation need"):
        open_set(path)


def test_what_cannot_be_written_is_told_before_any_work(packed, beton, tmp_path, capsys):
    def told(*arguments) -> str:
        assert main(["beton", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "exists: remove it" in told(packed, "--out", beton)
    assert "give a path that ends in .beton" in told(packed, "--out", tmp_path / "x")
    assert "is an address, which this option does not take" in told(packed, "--out", "s3://bucket/x.beton")
    assert "absent is not a folder" in told(packed, "--out", tmp_path / "absent" / "x.beton")
    assert "is a .beton already" in told(beton, "--out", tmp_path / "x.beton")
    assert "is made of one folder on this machine" in told("s3://bucket/set", "--out", tmp_path / "x.beton")
    assert "is made of one folder on this machine" in told(f"{packed},{packed}", "--out", tmp_path / "x.beton")
    assert "is not a folder" in told(tmp_path / "nowhere", "--out", tmp_path / "x.beton")
    assert list(tmp_path.iterdir()) == []


def test_what_ffcv_cannot_decode_is_refused_with_the_way_out(tmp_path, capsys):
    from tests.shards.test_foreign import write

    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(picture(2), exif=exif)
    write(tmp_path / "a.tar", {"0.jpg": encoded(picture(0)), "1.png": encoded(picture(1), "PNG"), "2.jpg": lying})
    assert main(["index", str(tmp_path)]) == 0
    assert main(["beton", str(tmp_path), "--out", str(tmp_path / "x.beton")]) == 2
    message = capsys.readouterr().err
    assert "2 of 3 samples are not sound, upright RGB or gray JPEGs (first: a.tar, sample 1)" in message
    assert f"make-shards pack {tmp_path} --out NEW" in message


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_damaged_sample_is_named_and_nothing_is_kept(copied, workers, capsys):
    tar = copied / "shard-000001.tar"
    record = open_set(copied).index(1)[2]
    damaged = bytearray(tar.read_bytes())
    damaged[int(record["offset"]) + 50] ^= 1
    tar.write_bytes(damaged)
    before = contents(copied)
    assert main(["beton", str(copied), "--out", str(copied / "x.beton"), "--workers", workers]) == 1
    message = capsys.readouterr().err
    assert f"{tar}: sample {record['position']} is damaged" in message
    assert f"make-shards verify {copied}" in message
    assert contents(copied) == before


def test_the_commands_say_what_they_did(packed, tmp_path, capsys):
    out = tmp_path / "x.beton"
    assert main(["beton", str(packed), "--out", str(out)]) == 0
    assert re.search(r"11 samples in \d+\.\d+ MB, read back and right", capsys.readouterr().out)
    assert main(["verify", str(out), "--decode"]) == 0
    assert "everything is as it was packed" in capsys.readouterr().out
    told = []
    for number, of_set in enumerate((str(packed), str(out))):
        assert main(["inspect", of_set, "--sheet", str(tmp_path / f"{number}.png")]) == 0
        told.append(capsys.readouterr().out.replace(of_set, "SET").replace(f"{number}.png", "PNG"))
    assert told[0] == told[1]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    whole = bytearray(out.read_bytes())
    whole[int(BetonSet.open(out).records[3]["offset"]) + 9] ^= 1
    out.write_bytes(whole)
    assert main(["verify", str(out)]) == 1
    assert "1 problem" in capsys.readouterr().out
