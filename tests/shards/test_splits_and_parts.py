import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.packing.content import DIGEST, first_of_each, split_of
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.manifest import find_tars
from shards.tools.index import index_folder
from shards.tools.verify import verify
from tests.shards.pictures import contents, fill, jpeg


def config(source, out, **options):
    return PackConfig(sources=(str(source),), out=str(out), **{"workers": 1, "shard_samples": 4, **options})


def sources(folder):
    return {line.rpartition("/")[2] for path in folder.glob("*.sources.txt") for line in path.read_text().splitlines()}


def test_the_split_depends_on_content_alone(tmp_path):
    source = fill(tmp_path / "in", 60)
    manifests = pack(config(source, tmp_path / "out", val_fraction=0.3))
    assert list(manifests) == ["train", "val"]
    val = sources(tmp_path / "out" / "val")
    assert 5 < len(val) < 35
    assert sources(tmp_path / "out" / "train") == {p.name for p in source.iterdir()} - val
    for name in ("train", "val"):
        assert verify(tmp_path / "out" / name, decode=True) == []
    # More images, other names, another seed: who was held out stays held out.
    for path in list(source.iterdir()):
        path.rename(source / f"renamed-{path.name}")
    for i in range(60, 80):
        (source / f"{i}.jpg").write_bytes(jpeg(i))
    pack(config(source, tmp_path / "later", val_fraction=0.3, seed=5))
    later = sources(tmp_path / "later" / "val")
    assert {name for name in later if name.startswith("renamed-")} == {f"renamed-{name}" for name in val}


def test_several_named_splits(tmp_path):
    source = fill(tmp_path / "in", 50)
    manifests = pack(config(source, tmp_path / "out", split=("val=0.2", "test=0.3")))
    assert sum(m.num_samples for m in manifests.values()) == 50
    names = [sources(tmp_path / "out" / name) for name in ("train", "val", "test")]
    assert all(names)
    assert set.union(*names) == {p.name for p in source.iterdir()}
    assert pack(config(source, tmp_path / "out", split=("val=0.2", "test=0.3"))) == manifests
    with pytest.raises(ValueError, match=r"give .*out/test or .*out/train or .*out/val"):
        open_set(tmp_path / "out")


@pytest.mark.parametrize(
    "split", [("val",), ("val=2",), ("train=0.1",), ("a=0.5", "b=0.5"), ("a/b=0.1",), ("a=0.1", "a=0.1")]
)
def test_splits_that_cannot_work_are_refused(split):
    with pytest.raises(ValueError, match="--split"):
        config("in", "out", split=split)


@given(
    values=st.lists(st.integers(0, 2**128 - 1) | st.integers(0, 3), max_size=50),
    shares=st.lists(st.floats(0.01, 0.3), max_size=3),
)
def test_firsts_and_splits_against_plain_python(values, shares):
    digests = np.array([(v >> 64, v & (2**64 - 1)) for v in values], dtype=DIGEST)
    firsts = [i if v == 0 else values.index(v) for i, v in enumerate(values)]
    assert first_of_each(digests).tolist() == firsts
    expected = []
    for v in values:
        point, number = (v >> 75) / 2**53, 0
        for i, share in reversed(list(enumerate(shares, 1))):
            if v and sum(shares[: i - 1]) <= point < sum(shares[: i - 1]) + share:
                number = i
        expected.append(number)
    assert split_of(digests, shares).tolist() == expected


def test_duplicates_are_left_out_and_written_down(tmp_path, capsys):
    source = fill(tmp_path / "in", 10)
    for i in range(5):
        (source / f"copy{i}.jpg").write_bytes(jpeg(i))
    (source / "empty1.jpg").write_bytes(b"")
    (source / "empty2.jpg").write_bytes(b"")
    arguments = [
        "pack",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--dedup",
        "--workers",
        "2",
        "--max-rejected",
        "0.1",
    ]
    assert main(arguments) == 0
    manifest = open_set(tmp_path / "out").manifest
    assert manifest.rejections == {"duplicate": 6, "empty": 1}
    assert (manifest.num_inputs, manifest.num_samples) == (17, 10)
    assert sources(tmp_path / "out") == {f"{i:04d}.jpg" for i in range(10)}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    assert {line["detail"].rpartition("/")[2] for line in lines if line["source"].endswith("copy3.jpg")} == {"0003.jpg"}


def test_each_split_accounts_for_its_duplicates(tmp_path):
    source = fill(tmp_path / "in", 20)
    for i in range(20):
        (source / f"copy{i}.jpg").write_bytes(jpeg(i))
    manifests = pack(config(source, tmp_path / "out", val_fraction=0.5, dedup=True))
    for manifest in manifests.values():
        assert manifest.num_samples == manifest.rejections["duplicate"] == manifest.num_inputs // 2 > 0


@settings(max_examples=8, deadline=None)
@given(num_parts=st.integers(1, 5), shard_samples=st.integers(1, 12), order=st.randoms(use_true_random=False))
def test_parts_in_any_order_give_the_bytes_of_one_process(tmp_path_factory, num_parts, shard_samples, order):
    folder = tmp_path_factory.mktemp("parts")
    source = fill(folder / "in", 11, classes=2)
    pack(config(source, folder / "whole", shard_samples=shard_samples))
    parts = list(range(num_parts))
    order.shuffle(parts)
    for part in parts:
        assert pack(config(source, folder / "out", shard_samples=shard_samples, part=f"{part}/{num_parts}")) is None
        with pytest.raises(ValueError, match="is not finished"):
            open_set(folder / "out")
    finish(str(folder / "out"), work_folder=str(folder))
    assert contents(folder / "out") == contents(folder / "whole")


def _pack_part(source, out, part):
    pack(config(source, out, part=part))


def test_parts_that_start_at_the_same_time_share_one_plan(tmp_path):
    source = fill(tmp_path / "in", 30, classes=2)
    pack(config(source, tmp_path / "whole"))
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_pack_part, args=(source, tmp_path / "out", f"{i}/3")) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert main(["finish", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert main(["finish", str(tmp_path / "out")]) == 0


def test_finish_names_the_missing_shards(tmp_path, capsys):
    source = fill(tmp_path / "in", 30)
    pack(config(source, tmp_path / "out", part="0/2"))
    with pytest.raises(PackError, match=r"4 of 8 shards are not there yet .shard-000001, shard-000003, shard-000005"):
        finish(str(tmp_path / "out"), work_folder=str(tmp_path))
    assert main(["finish", str(tmp_path / "nothing")]) == 2
    assert "no plan to finish" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--part 2/2"):
        config(source, tmp_path / "out", part="2/2")


@pytest.mark.parametrize("splits", [{}, {"val_fraction": 0.3}])
def test_a_part_of_the_shards_is_not_taken_for_a_set_of_others(splits, tmp_path):
    source, out = fill(tmp_path / "in", 30), tmp_path / "out"
    pack(config(source, out, part="0/2", **splits))
    before = contents(out)
    for folder in (out / name for name in ("train", "val")) if splits else (out,):
        assert list(folder.glob("*.tar"))
        with pytest.raises(ValueError, match=f"is not finished.*`make-shards finish {out}`"):
            index_folder(str(folder), workers=1)
        with pytest.raises(ValueError, match=f"is not finished.*`make-shards finish {out}`"):
            open_set(folder)
        # No training streams them.
        assert find_tars(str(folder)) == ()
    assert contents(out) == before
    # Tars of others beside the folder are none of it.
    other = out / "other"
    other.mkdir()
    (other / "images.tar").write_bytes(next((out / "train" if splits else out).glob("*.tar")).read_bytes())
    index_folder(str(other), workers=1)
