import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.verify import verify
from tests.shards.pictures import contents, encoded, fill, jpeg, picture


def config(source, out, **options):
    return PackConfig(sources=(str(source),), out=str(out), **{"workers": 1, "shard_samples": 7, **options})


def test_every_image_is_found_again_through_the_index(tmp_path):
    source = fill(tmp_path / "in", 20, classes=3)
    pack(config(source, tmp_path / "out"))
    shards = open_set(tmp_path / "out")
    assert (shards.num_samples, shards.num_shards) == (20, 3)
    assert shards.shard_sizes.tolist() == [7, 7, 6]
    assert shards.class_names == ("class0", "class1", "class2")
    found = {}
    for i in range(shards.num_shards):
        whole = shards.shard_path(i).read_bytes()
        names = (shards.path / f"shard-{i:06d}.sources.txt").read_text().splitlines()
        for record, name in zip(shards.index(i), names, strict=True):
            data = whole[int(record["offset"]) : int(record["offset"]) + int(record["size"])]
            assert shards.class_names[record["label"]] == name.split("/")[-2]
            assert (record["width"], record["height"], record["flags"]) == (48, 40, 0)
            found[name] = data
    assert found == {str(p): p.read_bytes() for p in source.rglob("*.jpg")}
    positions = np.concatenate([shards.index(i)["position"] for i in range(3)])
    assert positions.tolist() == list(range(20))
    assert verify(tmp_path / "out", decode=True) == []


def test_the_tar_has_keys_and_labels_only(tmp_path):
    pack(config(fill(tmp_path / "in", 5, classes=2), tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{i:012d}.{kind}" for i in range(5) for kind in ("jpg", "cls")]
        labels = [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
    assert labels == open_set(tmp_path / "out").index(0)["label"].tolist()
    assert sorted(labels) == [0, 0, 0, 1, 1]


def test_flat_folders_and_labels_none_give_no_labels(tmp_path):
    for name, source, labels in (
        ("flat", fill(tmp_path / "flat", 3), "auto"),
        ("one", fill(tmp_path / "one", 3, classes=1), "auto"),
        ("none", fill(tmp_path / "none", 3, classes=2), "none"),
    ):
        pack(config(source, tmp_path / f"out-{name}", labels=labels))
        shards = open_set(tmp_path / f"out-{name}")
        assert shards.class_names == ()
        assert shards.index(0)["label"].tolist() == [-1, -1, -1]
    pack(config(tmp_path / "one", tmp_path / "out-folder", labels="folder"))
    assert open_set(tmp_path / "out-folder").class_names == ("class0",)


def test_rejected_inputs_leave_gaps_and_are_written_down(tmp_path, capsys):
    source = fill(tmp_path / "in", 12)
    (source / "notes.txt").write_text("no image")
    (source / "empty.jpg").write_bytes(b"")
    (source / "cut.jpg").write_bytes(jpeg(99)[:-40])
    status = main(["pack", str(source), "--out", str(tmp_path / "out"), "--workers", "1"])
    manifest = open_set(tmp_path / "out").manifest
    assert status == 3
    assert "20.0% of the inputs were rejected" in capsys.readouterr().err
    assert (manifest.num_inputs, manifest.num_samples, manifest.num_rejected) == (15, 12, 3)
    assert manifest.rejections == {"damaged": 1, "empty": 1, "not an image": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"].split("/")[-1] for line in lines} == {"notes.txt", "empty.jpg", "cut.jpg"}
    kept = open_set(tmp_path / "out").index(0)["position"].tolist()
    assert sorted(kept + [int(line["key"]) for line in lines]) == list(range(15))
    assert main(["pack", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    assert main(["pack", str(source), "--out", str(tmp_path / "lax"), "--max-rejected", "0.2", "--workers", "1"]) == 0


def test_the_shuffle_mixes_and_can_be_turned_off(tmp_path):
    source = fill(tmp_path / "in", 30, classes=2)
    orders = {}
    for name, options in {"a": {}, "b": {"seed": 1}, "plain": {"shuffle": False}}.items():
        pack(config(source, tmp_path / name, shard_samples=30, **options))
        orders[name] = (tmp_path / name / "shard-000000.sources.txt").read_text().splitlines()
    assert orders["plain"] == sorted(orders["plain"])
    assert sorted(orders["a"]) == sorted(orders["b"]) == orders["plain"]
    assert orders["a"] != orders["b"]
    labels = open_set(tmp_path / "a").index(0)["label"]
    assert 5 < (np.diff(labels) != 0).sum() < 25


def test_a_finished_set_is_left_as_it_is(tmp_path):
    source = fill(tmp_path / "in", 5)
    first = pack(config(source, tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert pack(config(source, tmp_path / "out", workers=2)) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_files_added_after_packing_are_not_left_out_in_silence(tmp_path, capsys):
    command = ["pack", str(fill(tmp_path / "in", 5)), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    capsys.readouterr()
    (tmp_path / "in" / "added.jpg").write_bytes(jpeg(5))
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "was packed before, and is left as it is: it holds what the sources held then" in printed.err
    assert "5 images" in printed.out


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_a_file_is_not_taken_for_the_target(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file, and shards need a folder: choose another name"):
        pack(config(fill(tmp_path / "in", 2), tmp_path / out))


@pytest.mark.parametrize("command", ["summary", "table"])
def test_a_folder_that_cannot_be_written_has_a_way_out(tmp_path, capsys, command):
    pack(config(fill(tmp_path / "in", 5), tmp_path / "out"))
    name = {"summary": "summary.html", "table": "samples.parquet"}[command]
    (tmp_path / "out" / name).mkdir()
    assert main([command, str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "--file" in said
    assert "finished shards" not in said


def test_changed_settings_are_refused_with_the_difference(tmp_path):
    source = fill(tmp_path / "in", 5)
    pack(config(source, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--resize was unset, is 32, --seed was 0, is 3"):
        pack(config(source, tmp_path / "out", resize=32, seed=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0 is too small"),
        ({"quality": 101}, "--quality 101"),
        ({"max_rejected": 1.5}, "--max-rejected 1.5"),
        ({"max_aspect": 0.5}, "--max-aspect 0.5"),
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"resize": 0}, "--resize 0"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        config("in", "out", **options)


def test_a_missing_or_empty_source_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        assert main(["pack", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="unknown origin"):
        pack(config(fill(tmp_path / "in", 2), out))
    assert contents(out) == {"shard-000000.tar": b"precious"}
    assert not (out / ".pack").exists()


def test_an_unfinished_set_does_not_open(tmp_path):
    for path, message in ((tmp_path / "none", "is not a folder"), (tmp_path, "no manifest.json")):
        with pytest.raises(ValueError, match=message):
            open_set(path)
    (tmp_path / ".pack").mkdir()
    with pytest.raises(ValueError, match="not finished"):
        open_set(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "moco-fast-shards", "version": 99}')
    with pytest.raises(ValueError, match="version 99"):
        open_set(tmp_path)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(
        st.binary(min_size=1, max_size=40).filter(
            lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
        ),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    kinds=st.lists(st.sampled_from(["jpeg", "png", "broken"]), min_size=12, max_size=12),
    shard_samples=st.integers(1, 13),
)
def test_any_names_are_packed_or_rejected_with_unique_keys(tmp_path_factory, names, kinds, shard_samples):
    folder = tmp_path_factory.mktemp("names")
    source = folder / "in"
    source.mkdir()
    files = {"jpeg": jpeg(), "png": encoded(picture(), "PNG"), "broken": b"\xff\xd8\xffbroken"}
    for name, kind in zip(names, kinds, strict=False):
        (source / os.fsdecode(name)).write_bytes(files[kind])
    manifest = pack(config(source, folder / "out", shard_samples=shard_samples))[""]
    broken = kinds[: len(names)].count("broken")
    assert (manifest.num_samples, manifest.num_rejected) == (len(names) - broken, broken)
    assert manifest.num_inputs == len(names)
    keys = []
    for shard in manifest.shards:
        with tarfile.open(folder / "out" / shard.name) as tar:
            keys += tar.getnames()
        sources = (folder / "out" / f"{shard.stem}.sources.txt").read_text()
        assert sources.count("\n") == shard.num_samples
    assert len(set(keys)) == len(keys) == manifest.num_samples
    assert verify(folder / "out") == []


def test_bytes_do_not_depend_on_workers(tmp_path):
    source = fill(tmp_path / "in", 23, classes=3)
    for workers in (1, 2, 3):
        pack(config(source, tmp_path / f"out{workers}", workers=workers, shard_samples=4))
    first = contents(tmp_path / "out1")
    assert len(first) == 6 * 4 + 2
    assert contents(tmp_path / "out2") == first
    assert contents(tmp_path / "out3") == first


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.2}], ids=["plain", "split"])
def test_another_packing_to_the_same_place_has_its_own_plan(tmp_path, options):
    for count in (9, 4, 12):
        source = fill(tmp_path / f"in{count}", count, classes=count // 4)
        pack(config(source, tmp_path / "out", **options))
        expected = {p.name for p in source.rglob("*.jpg")}
        found = "".join(p.read_text() for p in (tmp_path / "out").rglob("*.sources.txt"))
        assert {line.rpartition("/")[2] for line in found.splitlines()} == expected
        shutil.rmtree(tmp_path / "out")


def test_a_target_inside_its_source_is_refused(tmp_path):
    source = fill(tmp_path / "in", 3)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path / "link" / "out"):
        with pytest.raises(ValueError, match="lies inside the source"):
            pack(config(source, out))
    assert len(contents(source)) == 3
    pack(config(source, tmp_path))


@pytest.mark.slow
def test_planning_a_long_list_takes_little_memory_and_time(tmp_path):
    """A twentieth of what ten million inputs may take: 3 GiB and a minute beyond the listing."""
    count = 500_000
    path = tmp_path / "list.txt"
    with path.open("w") as file:
        file.writelines(f"/photos/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG\tn{i % 1000:08d}\n" for i in range(count))
    code = f"""
import resource, time
from pathlib import Path
from shards.config import PackConfig
from shards.packing.planning import make_plan
from shards.storage.target import LocalTarget
from shards.ground.progress import ProgressBars
from shards.sources import open_source
config = PackConfig(sources=({str(path)!r},), out="unused", shard_samples=10_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.process_time()
num_inputs = sum(1 for _ in open_source({str(path)!r}, config.source_options()).inputs(Path("unused")))
middle = time.process_time()
target = LocalTarget({str(tmp_path / "out")!r})
target.scratch.mkdir(parents=True)
target.begin([])
plan = make_plan(config, target, ProgressBars(enabled=False))
end = time.process_time()
assert plan.num_inputs == num_inputs == {count}
assert len(plan.class_names) == 1000 and len(plan.tasks()) == 50
# The plan lists too: that time is not its own.
print((end - middle) - (middle - begin), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gibibytes = map(float, result.stdout.split())
    assert seconds < 60 / 20
    assert gibibytes < 3 / 20
