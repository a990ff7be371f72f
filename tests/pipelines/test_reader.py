import resource
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reading import reader as reader_module
from pipelines.reading.reader import Reader
from shards.sets import open_set
from shards.sets.record import RECORD
from tests.pipelines.shard_files import write_shards

PAYLOADS = [bytes([number]) * (50 + 37 * number) for number in range(30)]


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory):
    """30 samples that are no images at all: the reader does not care."""
    return open_set(write_shards(tmp_path_factory.mktemp("odd"), PAYLOADS, per_shard=4))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 29), min_size=1, max_size=60), st.integers(1, 5))
def test_bytes_come_in_the_order_asked_for(odd_shards, samples, num_threads):
    reader = Reader(odd_shards, num_threads=num_threads)
    try:
        wanted = np.array(samples)
        images = reader.submit(wanted, reader.records(wanted)).result()
    finally:
        reader.close()
    assert [image.tobytes() for image in images] == [PAYLOADS[sample] for sample in samples]


def test_records_are_those_of_a_walk_through_the_shards(odd_shards):
    walk = np.concatenate([odd_shards.index(shard) for shard in range(odd_shards.num_shards)])
    reader = Reader(odd_shards)
    samples = np.random.default_rng(0).permutation(30)
    assert (reader.records(samples) == walk[samples]).all()
    reader.close()


def open_shards(folder: Path) -> set[Path]:
    """Tars of this set that this process holds open; other tests' files are none of ours."""
    found: set[Path] = set()
    for link in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # the listing's own descriptor
            found.add(link.readlink())
    return {path for path in found if path.suffix == ".tar" and path.parent == folder.resolve()}


def read(reader: Reader, *samples: int) -> None:
    wanted = np.array(samples)
    reader.submit(wanted, reader.records(wanted)).result()


def test_the_shards_used_last_stay_open(odd_shards, monkeypatch):
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 2)
    reader = Reader(odd_shards)
    for sample in (0, 4, 1, 8):
        read(reader, sample)
    assert {path.name for path in open_shards(odd_shards.path)} == {"shard-000000.tar", "shard-000002.tar"}
    reader.close()


@pytest.mark.parametrize("kept_s", [-1.0, 1e9])
def test_a_shard_that_was_deleted_is_closed_once_it_was_open_long_enough(tmp_path, monkeypatch, kept_s):
    monkeypatch.setattr(reader_module, "_KEPT_DELETED_S", kept_s)
    shards = open_set(write_shards(tmp_path / "set", PAYLOADS, per_shard=4))
    reader = Reader(shards)
    read(reader, 0)
    shards.shard_path(0).unlink()
    read(reader, 4, 5)
    held = [file for file in reader._files.values() if file.is_deleted]
    assert len(held) == (kept_s > 0)
    reader.close()


def test_closing_ends_its_threads(odd_shards):
    before = set(threading.enumerate())
    reader = Reader(odd_shards)
    read(reader, *range(30))
    assert set(threading.enumerate()) > before
    reader.close()
    assert set(threading.enumerate()) <= before


def test_a_sample_is_named_with_its_shard_and_key(odd_shards):
    reader = Reader(odd_shards)
    assert reader.describe(5).endswith("shard-000001.tar: sample 5 (key 5)")
    reader.close()


def test_few_shards_stay_open_and_none_after_closing(odd_shards, monkeypatch):
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 2)
    reader = Reader(odd_shards)
    samples = np.arange(30)
    records = reader.records(samples)
    for _ in range(5):
        assert len(reader.submit(samples, records).result()) == 30
        assert 0 < len(open_shards(odd_shards.path)) <= 2
    reader.close()
    assert not open_shards(odd_shards.path)


@pytest.mark.parametrize(
    ("in_use", "limit", "opened"),
    [(5, 10**6, 5), (5, resource.RLIM_INFINITY, 5), (5, 4, 10), (0, 10**6, 10), (10**9, 10**6, 5)],
)
def test_shards_in_use_stay_open_with_their_records_within_the_limit(odd_shards, monkeypatch, in_use, limit, opened):
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(reader_module, "_RECORDS_BYTES", 9 * 40)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    calls = Counter()
    for name in ("open_shard", "index"):

        def counting(shard, name=name):
            calls[name] += 1
            return getattr(type(odd_shards), name)(odd_shards, shard)

        monkeypatch.setattr(odd_shards, name, counting)
    reader = Reader(odd_shards, in_use=in_use)
    # Twice through five shards, one after the other.
    read(reader, *[0, 4, 8, 12, 16])
    read(reader, *[0, 4, 8, 12, 16])
    assert calls == {"open_shard": opened, "index": opened}
    reader.close()


def test_the_record_cache_keeps_the_shards_used_last(odd_shards, monkeypatch):
    budget = 2 * 4 * RECORD.itemsize
    monkeypatch.setattr(reader_module, "_RECORDS_BYTES", budget)
    reader = Reader(odd_shards)
    for sample in (0, 4, 1, 8):
        reader.records(np.array([sample]))
    assert list(reader._records._kept) == [0, 2]
    assert reader._records._bytes == budget
    reader.close()


def test_the_record_cache_stays_in_its_budget(odd_shards, monkeypatch):
    monkeypatch.setattr(reader_module, "_RECORDS_BYTES", 9 * 40)
    reader = Reader(odd_shards)
    for _ in range(3):
        reader.records(np.arange(30))
        assert reader._records._bytes <= 9 * 40
        assert len(reader._records._kept) == 2
    reader.close()
