"""Few samples of many remote shards: their records and images by ranges, many at a time, records once."""

import pickle
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_fast import distributed
from moco_fast.evaluation.labels import count_labels_together, label_counts
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader
from pipelines.reading import prepare
from shards.sets import open_set
from shards.sets import remote as remote_module
from shards.sets.merged import MergedShardSet
from shards.sets.record import RECORD
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards
from tests.shards.web import Web, serving

pytestmark = pytest.mark.faults

NUM_SHARDS, PER_SHARD = 12, 40


class RangeStore(Web):
    """Notes every read with its range, and may wait until several are under way."""

    reads: list[tuple[str, str]]
    together: threading.Barrier | None = None

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        self.reads.append((self.path.rpartition("/")[2], self.headers.get("Range") or ""))
        if self.together is not None:
            with suppress(threading.BrokenBarrierError):
                self.together.wait(10)
        super().do_GET()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """480 images in 12 shards."""
    rng = np.random.default_rng(3)
    images = [jpeg(smooth_image(rng, 16, 16)) for _ in range(NUM_SHARDS * PER_SHARD)]
    labels = [number * 7 % 5 for number in range(len(images))]
    return write_shards(tmp_path_factory.mktemp("records") / "set", images, per_shard=PER_SHARD, labels=labels)


@pytest.fixture
def store(local):
    """The set on a web server; gives (its address, the server's handler)."""
    files = {f"set/{path.name}": path.read_bytes() for path in local.iterdir()}
    with serving(RangeStore, files) as (address, handler):
        handler.reads = []
        yield f"{address}/set", handler


def num_bytes_of(ranges: list[str]) -> list[int]:
    bounds = [each.removeprefix("bytes=").split("-") for each in ranges]
    return [int(end) - int(begin) + 1 for begin, end in bounds]


def reads_of(handler, ending: str) -> list[str]:
    return [where for name, where in handler.reads if name.endswith(ending)]


@pytest.mark.parametrize("near", [0, 3, 256])
def test_records_are_those_of_the_indexes_and_neighbors_are_one_request(store, local, monkeypatch, near):
    monkeypatch.setattr(remote_module, "_NEAR", near)
    address, handler = store
    opened, own = open_set(address), open_set(local)
    samples = np.array([0, 479, 3, 45, 46, 3, 130, 120])
    found = opened.records_of(samples)
    expected = np.concatenate([own.index(shard) for shard in range(NUM_SHARDS)])[samples]
    assert found.tobytes() == expected.tobytes() == own.records_of(samples).tobytes()
    # 0 and 3 of the first shard, 5 and 6 of the second, 0 and 10 of the fourth, the last of the last.
    spans = {0: [1] * 7, 3: [4, 2, 1, 1, 1], 256: [4, 2, 11, 1]}[near]
    assert sorted(num_bytes_of(reads_of(handler, ".index.npy"))) == sorted(RECORD.itemsize * span for span in spans)


@given(st.lists(st.lists(st.integers(0, 479), max_size=12), min_size=1, max_size=4), st.integers(0, 25))
@settings(max_examples=40, deadline=None)
def test_what_is_kept_never_changes_what_is_found(local_once, batches, most):
    own, opened = local_once
    opened._known = remote_module._NONE_KNOWN
    remote_module._MOST_KNOWN, before = most, remote_module._MOST_KNOWN
    try:
        for batch in batches:
            samples = np.array(batch, dtype=np.int64)
            assert opened.records_of(samples).tobytes() == own.records_of(samples).tobytes()
            assert len(opened._known.samples) <= max(most, *(len(set(each)) for each in batches))
    finally:
        remote_module._MOST_KNOWN = before


@pytest.fixture(scope="module")
def local_once(local):
    """The set here, and as a remote one whose requests are answered from here."""
    own = open_set(local)
    opened = remote_module.RemoteShardSet("http://127.0.0.1:1/set", own.manifest, "")
    opened._read_records = lambda shard, rows: own.index(shard)[rows]
    return own, opened


def test_many_requests_are_under_way_at_a_time(store, local, monkeypatch):
    monkeypatch.setattr(prepare, "_BYTES_A_REQUEST", 0)
    address, handler = store
    opened = open_set(address)
    samples = np.arange(NUM_SHARDS) * PER_SHARD
    # Each request is answered only when all have come.
    handler.together = threading.Barrier(NUM_SHARDS)
    opened.records_of(samples)
    data = DataConfig(shards=address, batch_size=NUM_SHARDS, backend="dali", num_threads=1)
    with open_loader(data, central_crop(16), samples=samples, shards=opened) as loader:
        pixels = torch.cat([batch.views[0] for batch in loader])
    assert torch.equal(pixels, central(local, samples))
    assert not handler.together.broken


def central(where, samples, shards=None) -> torch.Tensor:
    data = DataConfig(shards=str(where), batch_size=8, backend="dali", num_threads=1)
    with open_loader(data, central_crop(16), samples=samples, shards=shards) as loader:
        return torch.cat([batch.views[0] for batch in loader])


def test_an_evaluation_reads_single_samples_and_their_records_once_a_run(store, local, monkeypatch):
    monkeypatch.setattr(prepare, "_BYTES_A_REQUEST", 0)
    address, handler = store
    opened = open_set(address)
    samples = np.arange(24) * 20
    expected, own = central(local, samples), open_set(local)
    for evaluation in range(2):
        handler.reads.clear()
        assert torch.equal(central(address, samples, opened), expected)
        # Two samples of a shard are 20 records apart: one request for both.
        records = num_bytes_of(reads_of(handler, ".index.npy"))
        assert records == ([] if evaluation else [21 * RECORD.itemsize] * NUM_SHARDS)
        images = num_bytes_of(reads_of(handler, ".tar"))
        assert sorted(images) == sorted(own.records_of(samples)["size"].tolist())
        assert len(handler.reads) == len(records) + len(images)


def test_known_records_travel_with_the_set(store):
    address, handler = store
    opened = open_set(address)
    opened.records_of(np.arange(480))
    handler.reads.clear()
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.records_of(np.arange(480)).tobytes() == opened.records_of(np.arange(480)).tobytes()
    assert handler.reads == []


def test_a_shard_without_an_index_is_named(store):
    address, handler = store
    opened = open_set(address)
    del handler.files["set/shard-000003.index.npy"]
    with pytest.raises(ValueError, match=r"/set/shard-000003\.index\.npy belongs to what manifest\.json lists but is"):
        opened.records_of(np.arange(480))


def test_records_of_several_sets_as_one(store, local):
    address, handler = store
    merged = MergedShardSet([open_set(local), open_set(address), open_set(local)])
    assert merged.reads_ranges
    samples = np.array([1439, 0, 500, 480, 959, 960, 479])
    own = open_set(local)
    assert merged.records_of(samples).tobytes() == own.records_of(samples % 480).tobytes()
    assert len(reads_of(handler, ".index.npy")) == 2
    assert not MergedShardSet([own, own]).reads_ranges


def test_labels_are_counted_among_those_that_are_looked_at(store, local):
    address, handler = store
    opened, own = open_set(address), open_set(local)
    labels = np.concatenate([own.index(shard)["label"] for shard in range(NUM_SHARDS)])
    for at_most in (None, 7, 100, 480, 10**6):
        chosen = labels if at_most is None or at_most >= 480 else labels[np.arange(at_most) * 480 // at_most]
        for shards in (opened, own):
            assert label_counts(shards, at_most).tolist() == np.bincount(chosen).tolist()
    handler.reads.clear()
    assert label_counts(opened, 7).tolist() == label_counts(own, 7).tolist()
    assert handler.reads == []


def counted_together(where):
    shards = open_set(where)
    if distributed.rank():
        shards.index = shards.records_of = None  # not asked
    for at_most in (None, 9):
        count_labels_together(shards, at_most)
    return [label_counts(shards, at_most).tolist() for at_most in (None, 9)]


def test_the_first_rank_counts_for_all(run_ranks, local):
    shards = open_set(local)
    expected = [label_counts(shards, at_most).tolist() for at_most in (None, 9)]
    assert run_ranks(counted_together, str(local)) == [expected, expected]
