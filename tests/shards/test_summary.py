import base64
import io
import json
import re
import shutil
import tarfile
from html import unescape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.cli import main
from shards.config import PackConfig
from shards.ground.progress import ProgressBars
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.near_duplicates import _groups, near_duplicates, near_pairs
from shards.tools.summary import write_summary
from shards.tools.thumbnails import original_bytes, thumbnail
from tests.browser import DESK, PHONE, open_browser, what_is_wrong
from tests.shards.pictures import encoded, fill, jpeg, picture

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A set with classes, two near-duplicates, and inputs that were rejected: in a folder, a tar and a zip."""
    folder = tmp_path_factory.mktemp("summary")
    source = fill(folder / "in", 10, classes=3)
    detailed = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    large = detailed.resize((320, 240), Image.Resampling.BICUBIC)
    (source / "class0" / "large.jpg").write_bytes(encoded(large, quality=95))
    (source / "class1" / "small.jpg").write_bytes(encoded(large.resize((160, 120)), quality=60))
    red = encoded(Image.new("RGB", (160, 120), (200, 0, 0)))
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    (source / "class2" / "cut.jpg").write_bytes(encoded(noise)[:-4000])
    (source / "class2" / f"{HOSTILE.replace('/', '-')}.jpg").write_bytes(b"hello")
    with tarfile.open(source / "more.tar", "w") as tar:
        for name, data in (("whole.jpg", red), ("cut.jpg", encoded(noise)[:-4000])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = PackConfig(sources=(str(source),), out=str(folder / "out"), workers=1, shard_samples=5, max_aspect=3)
    assert pack(config)[""].num_rejected == 3
    return folder / "out"


def test_the_page_says_what_the_manifest_says_and_shows_pictures(packed, capsys):
    assert main(["summary", str(packed), "--near-duplicates", "--workers", "1"]) == 0
    path = packed / "summary.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = path.read_text()
    assert len(re.findall(r'alt="sample ', page)) == 13 + 2
    manifest = open_set(packed).manifest
    shown = unescape(page)
    for tally in (manifest.outcomes, manifest.jpegs):
        for name, count in tally.items():
            assert re.search(rf"<dt>{re.escape(name)}</dt><dd>.*?</dd><dd>{count}</dd>", shown)
    assert "<dt>1. class0</dt>" in page
    assert "damaged: 2" in page
    assert "not an image: 1" in page
    # The damaged ones have a picture, from the folder and out of the tar; what is not an image has none.
    for place in (packed.parent / "in" / "class2" / "cut.jpg", packed.parent / "in" / "more.tar" / "cut.jpg"):
        assert re.search(rf'<img src="data:image/jpeg;base64,[^"]+" alt="{re.escape(str(place))}">', page)
    assert page.count("no picture") == 1
    assert "2 images in 1 group look almost the same" in page
    assert write_summary(str(packed), with_near_duplicates=True).read_text() == page
    again = pack(PackConfig(sources=(str(packed),), out=str(packed.parent / "again"), workers=1))[""]
    assert (again.num_samples, again.num_rejected) == (manifest.num_samples, 0)


def test_commands_in_the_details_of_a_rejection_are_code(packed, tmp_path):
    lines = (packed / "rejected.jsonl").read_text().splitlines()
    changed = shutil.copytree(packed, tmp_path / "set")
    detail = "HEIC: install what reads it with `pip install '<heic>'`"
    lines = [json.dumps(json.loads(line) | {"detail": detail}) for line in lines]
    (changed / "rejected.jsonl").write_text("\n".join(lines) + "\n")
    page = write_summary(str(changed)).read_text()
    assert page.count("install what reads it with <code>pip install &#x27;&lt;heic&gt;&#x27;</code></div>") == 3


def test_nothing_of_the_page_comes_from_elsewhere_or_runs(packed, tmp_path):
    page = write_summary(str(packed), str(tmp_path / "page.html")).read_text()
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 10
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    assert "Near-duplicates" not in page


@pytest.mark.browser
def test_nothing_is_wrong_on_a_phone_and_on_a_desk(packed, tmp_path):
    page = write_summary(str(packed), str(tmp_path / "page.html"), with_near_duplicates=True)
    with open_browser() as browser:
        for size in (PHONE, DESK):
            assert what_is_wrong(browser, page, size) == []


@pytest.mark.browser
def test_long_names_of_classes_do_not_run_into_each_other(tmp_path):
    source = fill(tmp_path / "in", 12, classes=4)
    for folder in list(source.iterdir()):
        folder.rename(source / f"{folder.name}_with_a_name_of_many_words_{'and_one_more_' * 8}")
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), workers=1))
    page = write_summary(str(tmp_path / "out"), with_near_duplicates=True)
    cells = "[...document.querySelectorAll('.found > div')]"
    with open_browser() as browser:
        for size in (PHONE, DESK):
            assert what_is_wrong(browser, page, size) == []
            assert browser.run(f"{cells}.filter(cell => cell.scrollWidth > cell.clientWidth).length") == 0


def test_sets_without_samples_labels_or_a_folder(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"hello")
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "empty"), workers=1, max_rejected=1))
    page = write_summary(str(tmp_path / "empty"), with_near_duplicates=True).read_text()
    assert "not an image: 1" in page
    assert "None were found" in page
    pack(PackConfig(sources=(str(fill(tmp_path / "flat", 3)),), out=str(tmp_path / "unlabeled"), workers=1))
    page = write_summary(str(tmp_path / "unlabeled")).read_text()
    assert "no sample has a label" in page
    assert "<h2>Labels" not in page
    both = f"{tmp_path / 'unlabeled'},{tmp_path / 'empty'}"
    assert "of 4 inputs" in write_summary(both, str(tmp_path / "both.html")).read_text()
    assert main(["summary", f"{tmp_path / 'unlabeled'},{tmp_path / 'unlabeled'}"]) == 2
    assert "--file" in capsys.readouterr().err


def test_a_thumbnail_shows_what_is_there_of_a_damaged_image():
    whole = encoded(Image.new("RGB", (400, 200), (10, 200, 30)), quality=90)
    for data in (whole, whole[:-300], encoded(picture(mode="CMYK")), encoded(picture(), "PNG")):
        url = thumbnail(data, 64)
        assert url is not None
        small = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert max(small.size) <= 64
    for data in (b"", b"hello", whole[:40]):
        assert thumbnail(data, 64) is None


def test_originals_are_read_from_where_they_are_and_links_are_not_followed(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "bad.tar").write_bytes(b"not a tar")
    places = [str(tmp_path / name) for name in ("a.jpg", "link.jpg", "gone.jpg", "bad.tar/x.jpg", "a.jpg/x")]
    places += ["s3://bucket/x.jpg", f"https://example.org/{'long' * 100}.jpg", "nul\0.jpg"]
    assert original_bytes(places) == {places[0]: jpeg(1)}


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=4)), max_size=11),
)
def test_near_pairs_are_those_of_plain_python(seeds, changes):
    values = [*seeds, *(seeds[i % len(seeds)] ^ sum(1 << bit for bit in bits) for i, bits in changes)]
    naive = [
        [i, j]
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= 3
    ]
    assert near_pairs(np.array(values, dtype=np.uint64)).tolist() == naive


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1]), max_size=12))
def test_groups_are_connected_components(pairs):
    components = [{row} for row in range(10)]
    for a, b in pairs:
        joined = [each for each in components if a in each or b in each]
        components = [each for each in components if each not in joined] + [set().union(*joined)]
    expected = sorted(sorted(each) for each in components if len(each) > 1)
    assert sorted(_groups([list(pair) for pair in pairs])) == expected


def test_flat_and_tiny_images_have_no_duplicates(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        (source / f"flat{number}.jpg").write_bytes(encoded(Image.new("RGB", (64, 64), (number, 0, 0))))
        (source / f"tiny{number}.jpg").write_bytes(encoded(picture(1, 6, 6)))
        (source / f"same{number}.jpg").write_bytes(encoded(picture(5, 40 + number, 40)))
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "out"), workers=1, shuffle=False))
    shards = open_set(tmp_path / "out")
    [group] = near_duplicates(shards, workers=1, progress=ProgressBars(enabled=False))
    names = (tmp_path / "out" / "shard-000000.sources.txt").read_text().splitlines()
    assert sorted(names[row].rpartition("/")[2] for row in group) == ["same0.jpg", "same1.jpg", "same2.jpg"]
