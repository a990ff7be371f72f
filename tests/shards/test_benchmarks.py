"""Benchmarks with annotations, packed: every file as it was, by parts and after kills, and what is refused."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.benchmark import open_benchmark
from shards.sets.record import Flag
from shards.sources.registry import open_source
from shards.tools.inspect_set import describe
from shards.tools.verify import verify
from tests.shards.pictures import contents, encoded, jpeg, picture


def benchmark(folder: Path, *, num: int = 5) -> Path:
    """A year of VOC with boxes, classes of pixels for some, and litter."""
    year = folder / "VOC2007"
    for inner in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main"):
        (year / inner).mkdir(parents=True)
    for number in range(num):
        (year / "JPEGImages" / f"{number:06}.jpg").write_bytes(jpeg(number))
        (year / "Annotations" / f"{number:06}.xml").write_text(f"<annotation>{number}</annotation>")
    (year / "SegmentationClass" / "000001.png").write_bytes(encoded(picture(), "PNG"))
    (year / "SegmentationClass" / "000099.png").write_bytes(encoded(picture(), "PNG"))
    (year / "ImageSets" / "Main" / "train.txt").write_text("000000\n000001\n")
    (year / "JPEGImages" / ".DS_Store").write_bytes(b"x")
    (year / "readme.txt").write_text("text")
    return folder


def config(source: Path, out: Path, **options) -> PackConfig:
    return PackConfig(
        sources=(str(source),), out=str(out), annotations=True, **{"workers": 1, "shard_samples": 2, **options}
    )


def packed(source: Path, out: Path, **options):
    manifest = pack(config(source, out, **options))[""]
    assert verify(out, decode=True) == []
    assert manifest.num_samples + manifest.num_rejected == manifest.num_inputs
    return open_set(out)


def test_every_file_is_as_it_was_and_the_rest_is_counted(tmp_path) -> None:
    source = benchmark(tmp_path / "devkit")
    shards = packed(source, tmp_path / "out")
    assert shards.num_samples == 5
    files = open_benchmark(str(tmp_path / "out")).files
    kept = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    aside = {"VOC2007/JPEGImages/.DS_Store", "VOC2007/readme.txt", "VOC2007/SegmentationClass/000099.png"}
    assert {path: files.read(path) for path in files.files} == {
        path: data for path, data in kept.items() if path not in aside
    }
    assert shards.manifest.left_aside == {"litter (.DS_Store)": 1, "png": 1, "txt": 1}
    assert (
        tmp_path / "out" / "files" / "VOC2007" / "ImageSets" / "Main" / "train.txt"
    ).read_text() == "000000\n000001\n"
    assert next(describe(shards)).startswith(f"{tmp_path / 'out'}: 5 samples in 3 shards")


def test_what_is_beside_images_is_left_aside_and_damaged_images_are_rejected(tmp_path) -> None:
    coco = tmp_path / "coco"
    for folder in ("annotations", "train2017", "labels/train2017"):
        (coco / folder).mkdir(parents=True)
    (coco / "annotations" / "instances_train2017.json").write_text("{}")
    for name in ("1.jpg", "2.JPEG", "3"):
        (coco / "train2017" / name).write_bytes(jpeg(int(name[0])))
    (coco / "train2017" / "4.jpg").write_bytes(b"no image")
    (coco / "train2017" / "notes.md").write_text("text")
    (coco / "labels" / "train2017" / "1.txt").write_text("0 0.5 0.5 0.1 0.1")
    manifest = packed(coco, tmp_path / "out", max_rejected=1).manifest
    assert (manifest.num_samples, manifest.num_rejected, manifest.left_aside) == (3, 1, {"md": 1, "txt": 1})


def test_shards_are_samples_of_webdataset(tmp_path) -> None:
    packed(benchmark(tmp_path / "devkit"), tmp_path / "out", shuffle=False, shard_samples=5)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        names = [member.name for member in tar if "0001." in member.name]
        assert names == [f"{1:012}.jpg", f"{1:012}.xml", f"{1:012}.class.png"]
        index = (tmp_path / "out" / "shard-000000.idx").read_text().splitlines()
        words = index[2].split()
        assert words[::4] == ["jpg", "xml", "class.png"]
        for at, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
            member = tar.getmember(name)
            assert (member.offset_data, member.size) == (int(at), int(size))


def test_a_year_and_a_folder_of_years_give_the_same_paths(tmp_path) -> None:
    source = benchmark(tmp_path / "devkit")
    (source / "VOC2012").symlink_to(source / "VOC2007")
    one = open_source(str(source / "VOC2007"), config(source, tmp_path).source_options())
    assert {item.name.split(b"/")[0] for item in one.inputs(tmp_path) if hasattr(item, "offset")} == {b"VOC2007"}
    # A link has its own name.
    other = open_source(str(source / "VOC2012"), config(source, tmp_path).source_options())
    assert other.files() == ["VOC2012/ImageSets/Main/train.txt"]
    with pytest.raises(PackError, match=r"VOC2012 is a link to a folder: give --follow-links"):
        pack(config(source, tmp_path / "out"))
    assert pack(config(source, tmp_path / "followed", follow_links=True))[""].num_samples == 10
    (source / "VOC2007" / "again").symlink_to(source)
    with pytest.raises(PackError, match="again is a link to a folder that holds it"):
        pack(config(source, tmp_path / "round", follow_links=True))


def test_parts_and_workers_give_the_same_bytes(tmp_path) -> None:
    source = benchmark(tmp_path / "devkit")
    packed(source, tmp_path / "whole")
    packed(source, tmp_path / "two", workers=2)
    for part in (1, 0):
        assert pack(config(source, tmp_path / "parts", part=f"{part}/2")) is None
    finish(str(tmp_path / "parts"))
    wanted = contents(tmp_path / "whole")
    assert contents(tmp_path / "two") == wanted
    assert contents(tmp_path / "parts") == wanted
    # The same command finds it done.
    assert pack(config(source, tmp_path / "whole"))[""].num_samples == 5


def test_images_that_are_not_plain_are_kept_with_a_flag(tmp_path) -> None:
    source = benchmark(tmp_path / "devkit")
    place = source / "VOC2007" / "JPEGImages"
    turned = Image.Exif()
    turned[0x0112] = 6
    (place / "000000.jpg").write_bytes(encoded(picture(), "PNG"))
    (place / "000001.jpg").write_bytes(jpeg(exif=turned))
    (place / "000002.jpg").write_bytes(jpeg(progressive=True))
    (place / "000003.jpg").write_bytes(b"no image")
    shards = packed(source, tmp_path / "out", shuffle=False, shard_samples=9)
    flags = [Flag(int(each)) for each in shards.index(0)["flags"]]
    assert flags == [Flag.NOT_JPEG, Flag.NEEDS_ORIENTATION, Flag.NOT_BASELINE, Flag(0)]
    assert shards.manifest.outcomes == {"copied": 4, "needs orientation": 1, "not baseline": 1, "not jpeg": 1}
    assert shards.manifest.rejections == {"not an image": 1}
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert f"{0:012}.png" in tar.getnames()


@pytest.mark.parametrize("what", ["tar", "files.jsonl", "files/VOC2007/ImageSets/Main/train.txt"])
def test_verify_finds_a_changed_byte(tmp_path, what) -> None:
    packed(benchmark(tmp_path / "devkit"), tmp_path / "out")
    path = next(each for each in sorted((tmp_path / "out").rglob("*")) if str(each).endswith(what))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    problems = verify(tmp_path / "out")
    assert problems
    assert any(path.name in str(problem) for problem in problems)


REFUSED = {
    "--resize cannot be given with --annotations": {"resize": 64},
    "--quality cannot be given": {"quality": 80},
    "--val-fraction cannot be given": {"val_fraction": 0.1},
    "--dedup cannot be given": {"dedup": True},
    "--labels cannot be given": {"labels": "folder"},
    "--members cannot be given": {"members": ("jpg",)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_change_or_drop_images_is_refused(tmp_path, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        config(tmp_path, tmp_path / "out", **REFUSED[reason])


def test_other_folders_are_refused_with_the_layouts_that_are_known(tmp_path, capsys) -> None:
    (tmp_path / "photos").mkdir()
    words = ["--annotations", "--out", str(tmp_path / "out")]
    assert main(["pack", str(tmp_path / "photos"), *words]) == 2
    assert "is not in a layout that --annotations knows" in " ".join(capsys.readouterr().err.split())
    assert main(["pack", "s3://bucket/voc", *words]) == 2
    assert "takes a folder on this machine" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_two_benchmarks_with_the_same_list_are_refused(tmp_path) -> None:
    sources = tuple(str(benchmark(tmp_path / name)) for name in ("one", "two"))
    both = PackConfig(sources=sources, out=str(tmp_path / "out"), annotations=True, workers=1)
    with pytest.raises(ValueError, match=r"VOC2007/ImageSets/Main/train\.txt is in .*one and in .*two"):
        pack(both)
    assert not (tmp_path / "out").exists()


def test_a_packing_begun_before_this_option_continues(tmp_path) -> None:
    plain = PackConfig(sources=("photos",), out="out").settings()
    assert "annotations" not in plain
    assert json.dumps(config(tmp_path, tmp_path).settings()).count('"annotations": true') == 1
