import threading
from collections import Counter

import pytest

from shards.config import PackConfig
from shards.packing import records
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.storage.target import LocalTarget
from tests.shards.pictures import contents, fill


def config(source, out, **options):
    return PackConfig(sources=(str(source),), out=str(out), workers=1, shard_samples=2, max_rejected=1, **options)


@pytest.fixture
def reads(monkeypatch):
    """How often each file of a target is read."""
    counts, get = Counter(), LocalTarget.get

    def counting(self, name):
        counts[name] += 1
        return get(self, name)

    monkeypatch.setattr(LocalTarget, "get", counting)
    return counts


@pytest.mark.parametrize("num_lost", [0, 1, 2])
def test_finishing_reads_one_record_for_a_group_of_shards(tmp_path, monkeypatch, reads, num_lost):
    monkeypatch.setattr(records, "GROUP_SHARDS", 4)
    source = fill(tmp_path / "in", 24)
    (source / "0003.jpg").write_bytes(b"hello")
    pack(config(source, tmp_path / "whole"))
    for part in range(2):
        pack(config(source, tmp_path / "out", part=f"{part}/2"))
    done = tmp_path / "out" / ".pack" / "done"
    groups = sorted(done.glob("group-*"))
    assert len(groups) == 4
    for group in groups[:num_lost]:
        group.unlink()
    reads.clear()
    finish(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    of_records = Counter({name: count for name, count in reads.items() if name.startswith(".pack/done/")})
    num_single = sum(count for name, count in of_records.items() if "/group-" not in name)
    # Those of lost groups, and the one that holds what was rejected.
    assert num_single == 4 * num_lost + 1
    assert of_records.total() == len(groups) - num_lost + num_single


def test_records_are_read_several_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GROUP_SHARDS", 1000)
    source = fill(tmp_path / "in", 8)
    pack(config(source, tmp_path / "out", part="0/1"))
    for group in (tmp_path / "out" / ".pack" / "done").glob("group-*"):
        group.unlink()
    get, both = LocalTarget.get, threading.Barrier(2)

    def meeting(self, name):
        if name.startswith(".pack/done/"):
            both.wait(20)
        return get(self, name)

    monkeypatch.setattr(LocalTarget, "get", meeting)
    assert finish(str(tmp_path / "out"))[""].num_samples == 8
