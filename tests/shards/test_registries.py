"""A new kind of source, of set or of executor is one file and one line in its registry."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shards.config import PackConfig
from shards.packing.executors import EXECUTORS
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.base import BaseSet
from shards.sets.local import LocalShardSet
from shards.sets.registry import SETS, KindOfSet
from shards.sources import Input
from shards.sources.registry import SOURCES
from shards.storage.file_kinds import ARCHIVES
from tests.shards.pictures import contents, fill, jpeg


class TwinSource:
    """A file that says how many pictures there are."""

    is_remote = False

    def __init__(self, path, options=None):
        self.path = path

    def spec(self):
        return {"kind": "twins", "path": self.path}

    def inputs(self, spool):
        for number in range(int(Path(self.path).read_text())):
            yield Input(b"%d" % number, label="twin")

    def read(self, name, offset, size):
        return jpeg(int(name))

    def describe(self, name):
        return f"{self.path}: {name.decode()}"


def test_a_source_is_one_class_one_line_and_its_suffix(tmp_path, monkeypatch):
    module = ModuleType("twins")
    module.TwinSource = TwinSource
    monkeypatch.setitem(sys.modules, "twins", module)
    monkeypatch.setitem(SOURCES, "twins", "twins:TwinSource")
    monkeypatch.setitem(ARCHIVES, ".twins", "twins")
    (tmp_path / "all.twins").write_text("5")
    pack(PackConfig(sources=(str(tmp_path / "all.twins"),), out=str(tmp_path / "out"), workers=1, labels="column"))
    packed = open_set(tmp_path / "out")
    assert (packed.num_samples, packed.class_names) == (5, ("twin",))
    for shard in range(packed.num_shards):
        assert packed.open_shard(shard).read_into(np.empty(512, dtype=np.uint8), 0) == 512


class BackwardsSet(BaseSet):
    """The shards of a folder in the opposite order."""

    kind = "local"

    def __init__(self, inner):
        super().__init__(f"backwards:{inner.where}", inner.manifest)
        self.inner = inner
        self.shard_sizes = inner.shard_sizes[::-1]

    def index(self, shard):
        return self.inner.index(self.num_shards - 1 - shard)

    def open_shard(self, shard):
        return self.inner.open_shard(self.num_shards - 1 - shard)

    def shard_name(self, shard):
        return self.inner.shard_name(self.num_shards - 1 - shard)


def test_a_kind_of_set_is_one_class_and_one_line(tmp_path, monkeypatch):
    pack(PackConfig(sources=(str(fill(tmp_path / "in", 8)),), out=str(tmp_path / "out"), workers=1, shard_samples=3))

    def opens(where):
        return BackwardsSet(open_set(where.removeprefix("backwards:")))

    monkeypatch.setattr("shards.sets.registry.SETS", {"backwards": KindOfSet(is_backwards, opens), **SETS})
    there, back = open_set(tmp_path / "out"), open_set(f"backwards:{tmp_path / 'out'}")
    assert isinstance(there, LocalShardSet)
    assert back.shard_sizes.tolist() == there.shard_sizes.tolist()[::-1] == [2, 3, 3]
    assert np.array_equal(back.index(0), there.index(2))
    part, inner = back.part(1)
    assert (part, inner) == (back, 1)
    assert repr(back).startswith("BackwardsSet('backwards:")


def is_backwards(where):
    return where.startswith("backwards:")


@pytest.mark.parametrize("executor", ["last first", "local"])
def test_an_executor_is_one_function_and_one_line(tmp_path, monkeypatch, executor):
    done = []

    def last_first(config):
        def run(job, tasks, *, tick):
            for task in reversed(tasks):
                done.append(task.shard)
                yield task, job(task, tick)

        return run

    monkeypatch.setitem(EXECUTORS, "last first", last_first)
    source = str(fill(tmp_path / "in", 8))
    pack(PackConfig(sources=(source,), out=str(tmp_path / "out"), workers=1, shard_samples=3, executor=executor))
    assert done == ([2, 1, 0] if executor == "last first" else [])
    pack(PackConfig(sources=(source,), out=str(tmp_path / "usual"), workers=1, shard_samples=3))
    assert contents(tmp_path / "out") == contents(tmp_path / "usual")
