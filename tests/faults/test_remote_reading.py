"""Training from a bucket: the cache on local disk, and what goes wrong on the way."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.plan.order import OrderPlan
from pipelines.plan.steps import ListedSteps
from pipelines.reading import cache as cache_module
from pipelines.reading import fetch as fetch_module
from pipelines.reading.cache import CachedShardSet, CacheFolder, CacheFullError, FetchError, Holder
from pipelines.reading.fetch import FetchedSteps, _Ahead, cached
from pipelines.reading.pace import Pace
from pipelines.reading.reader import Reader
from shards.ground.errors import ExpiredError
from shards.sets import ShardSet, open_set
from shards.sets.manifest import ShardTable
from shards.sets.remote import RemoteShardSet
from shards.storage import stores as storage
from tests.pipelines.central import open_central
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards
from tests.shards.web import Web, serving

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")
NUM_SHARDS, PER_SHARD = 24, 8


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class Store(Web):
    """A bucket that counts what is read, and that can also refuse, change bytes, or wait."""

    reads: list[str]
    refused = expired = ""
    changed = 0
    together: threading.Barrier | None = None
    """Tars are given to so many readers at once, or none, after the first `alone` of them."""
    alone = 0

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        with self.turns:
            self.reads.append(self.path)
            number = len(tars_read(type(self)))
        if self.refused and self.refused in self.path:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if self.expired and self.expired in self.path and "=test/" in self.headers["Authorization"]:
            self.answer(400, b"<Error><Code>ExpiredToken</Code></Error>")
            return
        if self.together is not None and self.path.endswith(".tar") and number > self.alone:
            self.together.wait(timeout=20)
        super().do_GET()

    def answer(self, status, data, headers=None):
        if self.command == "GET" and self.path.endswith(".tar") and self.changed > 0:
            type(self).changed -= 1
            data = bytes(255 - byte for byte in data)
        super().answer(status, data, headers)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """192 images in 24 shards."""
    rng = np.random.default_rng(3)
    images = [jpeg(smooth_image(rng, 40, 40)) for _ in range(NUM_SHARDS * PER_SHARD)]
    return write_shards(tmp_path_factory.mktemp("remote") / "set", images, per_shard=PER_SHARD)


@pytest.fixture
def store(local, monkeypatch):
    """The set at s3://bucket/set; gives the server's handler."""
    files = {f"bucket/set/{path.name}": path.read_bytes() for path in local.iterdir()}
    with serving(Store, files) as (address, handler):
        handler.reads = []
        handler.broken = ".tar"
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "CLIENT_OPTIONS", {"timeout": "1s", "connect_timeout": "1s"})
        backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
        retries = {"max_retries": 4, "retry_timeout": timedelta(seconds=10), "backoff": backoff}
        monkeypatch.setattr(storage, "RETRIES", retries)
        monkeypatch.setattr(cache_module, "_BACK_OFF_S", 0.01)
        monkeypatch.setattr(cache_module, "_OUTAGE_S", 0.5)
        storage.open_folder.cache_clear()
        yield handler
        storage.open_folder.cache_clear()


def tar_bytes(local: Path) -> int:
    """Cache space of the largest shard."""
    return max(path.stat().st_size for path in local.glob("*.tar")) + 40 * PER_SHARD + 1000


def open_cached(folder: Path, *, shards: float = NUM_SHARDS, local: Path, **options: Any) -> CachedShardSet:
    budget = int(shards * tar_bytes(local))
    cache = CacheFolder(path=folder, budget_bytes=budget, share_bytes=budget, **options)
    opened = cached(open_set("s3://bucket/set"), cache)
    assert isinstance(opened, CachedShardSet)
    return opened


def promise(shards: RemoteShardSet, shard: int, digest: str) -> None:
    """Let a manifest give a tar a digest: those of `write_shards` have none."""
    entries = list(shards.manifest.shards)
    entries[shard] = replace(entries[shard], digests={".tar": digest})
    shards.manifest = replace(shards.manifest, shards=ShardTable.of(entries))


def tars_read(store) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in store.reads if path.endswith(".tar"))


def tars_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*.tar"))


def assert_same(one: ShardSet, two: ShardSet) -> None:
    samples = np.arange(one.num_samples)
    found = []
    for shards in (one, two):
        reader = Reader(shards, num_threads=2)
        found.append([image.tobytes() for image in reader.submit(samples, reader.records(samples)).result()])
        reader.close()
    assert found[0] == found[1]


def test_a_real_server_of_s3_is_read_like_a_folder(local, tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        storage.open_folder.cache_clear()
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        for path in local.iterdir():
            storage.Folder("s3://bucket/set").put(path.name, path)
        shards = open_cached(tmp_path / "cache", local=local)
        assert_same(shards, open_set(local))
        with pytest.raises(ValueError, match=r"cannot read s3://no-such-bucket/set/manifest\.json|has no manifest"):
            open_set("s3://no-such-bucket/set")
    finally:
        server.stop()
        storage.open_folder.cache_clear()


def test_opening_reads_the_manifest_alone_and_samples_come_by_ranges(store, local):
    shards = open_set("s3://bucket/set/")
    assert isinstance(shards, RemoteShardSet)
    assert [path.rpartition("/")[2] for path in store.reads] == ["manifest.json"]
    reader = Reader(shards, num_threads=2)
    samples = np.array([17, 3, 190])
    images = reader.submit(samples, reader.records(samples)).result()
    reader.close()
    assert sum(path.endswith(".index.npy") for path in store.reads) == 3
    own = Reader(open_set(local))
    assert [i.tobytes() for i in images] == [i.tobytes() for i in own.submit(samples, own.records(samples)).result()]
    own.close()


@pytest.mark.parametrize("scheme", ["gs", "az", "http"])
def test_other_stores_are_read_as_well(store, local, tmp_path, monkeypatch, scheme):
    address = os.environ["AWS_ENDPOINT_URL"]
    key = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    for name, value in {
        "GOOGLE_BASE_URL": address,
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key),
        "AZURE_STORAGE_ENDPOINT": address,
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_SKIP_SIGNATURE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    url = f"{address}/bucket/set" if scheme == "http" else f"{scheme}://bucket/set"
    folder = CacheFolder(path=tmp_path / "cache", budget_bytes=1 << 30, share_bytes=1 << 30)
    assert_same(cached(open_set(url), folder), open_set(local))


def test_copies_are_bit_equal_and_fetched_once(store, local, tmp_path):
    for _ in range(2):
        assert_same(open_cached(tmp_path / "cache", local=local), open_set(local))
    assert tars_read(store) == [f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
    assert not [*tmp_path.glob("**/*.part"), *tmp_path.glob("**/*.held")]


@pytest.mark.parametrize("fault", ["503", "reset", "short", "stall"])
def test_faults_that_pass_are_overcome(store, local, tmp_path, fault):
    store.fault, store.remaining = fault, 2
    shards = open_cached(tmp_path / "cache", local=local)
    shards.fetch(0)
    assert store.remaining < 0
    assert tars_in(tmp_path / "cache") == ["shard-000000.tar"]
    assert next(tmp_path.glob("cache/*/*.tar")).read_bytes() == (local / "shard-000000.tar").read_bytes()


def test_an_outage_is_waited_for(store, local, tmp_path, caplog):
    # Longer than all that the client does about it.
    shards = open_cached(tmp_path / "cache", local=local)
    store.fault, store.remaining = "503", 12
    shards.fetch(3)
    assert store.remaining < 0
    assert next(record.message for record in caplog.records).endswith("(trying again in 0.01 s)")
    assert tars_in(tmp_path / "cache") == ["shard-000003.tar"]


def test_an_outage_that_lasts_is_told_and_leaves_nothing(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", local=local)
    store.fault, store.remaining = "503", 10**6
    with pytest.raises(ValueError, match=r"cannot read s3://bucket/set/shard-000003\.tar: .*Fix this"):
        shards.fetch(3)
    assert not list(tmp_path.glob("cache/*/*"))
    store.remaining = 0
    shards.fetch(3)
    assert tars_in(tmp_path / "cache") == ["shard-000003.tar"]


def test_a_refusal_an_absent_shard_and_a_changed_one_are_told(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", local=local)
    store.refused = "shard-000001.tar"
    with pytest.raises(ValueError, match=r"cannot read s3://bucket/set/shard-000001\.tar: "):
        shards.fetch(1)
    content = store.files.pop("bucket/set/shard-000002.tar")
    with pytest.raises(FetchError, match=r"shard-000002\.tar is listed in manifest\.json but absent: restore it"):
        shards.fetch(2)
    store.files["bucket/set/shard-000002.tar"] = content + b"more"
    with pytest.raises(FetchError, match=rf"shard-000002\.tar has {len(content) + 4} bytes, and manifest.json says"):
        shards.fetch(2)
    promise(shards, 4, "1" * 32)
    with pytest.raises(FetchError, match=r"shard-000004\.tar arrived with digest \w+, and manifest\.json says 1111"):
        shards.fetch(4)
    assert not list(tmp_path.glob("cache/*/*"))


def test_expired_keys_end_fetching_at_once_unless_they_can_be_renewed(store, local, tmp_path, monkeypatch, caplog):
    store.expired = ".tar"
    shards = open_cached(tmp_path / "cache", local=local)
    with pytest.raises(ExpiredError, match="Set new ones in the environment"):
        shards.fetch(1)
    assert not caplog.records
    keys = tmp_path / "keys"
    keys.write_text("[team]\naws_access_key_id=test\naws_secret_access_key=s\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_PROFILE", "team")
    storage.open_folder.cache_clear()

    def log_in(*said):
        messages.append(said[0] % said[1:])
        keys.write_text("[team]\naws_access_key_id=new\naws_secret_access_key=s\n")

    messages = []
    monkeypatch.setattr(cache_module._LOG, "warning", log_in)
    shards.fetch(1)
    [message] = messages
    assert message.endswith("Renew them, as by logging in again (trying again in 0.01 s)")


def test_bytes_changed_on_the_way_are_fetched_again(store, local, tmp_path):
    import xxhash

    shards = open_cached(tmp_path / "cache", local=local)
    digest = xxhash.xxh3_128_hexdigest((local / "shard-000005.tar").read_bytes())
    promise(shards, 5, digest)
    store.changed = 1
    shards.fetch(5)
    assert len(tars_read(store)) == 2
    assert next(tmp_path.glob("cache/*/*.tar")).read_bytes() == (local / "shard-000005.tar").read_bytes()


def test_the_least_recently_used_make_room_and_what_is_held_stays(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", shards=3.5, local=local)
    holder = Holder(shards.folder)
    holder.hold({shards.cached_name(0)})
    for shard in range(3):
        shards.fetch(shard)
        os.utime(next(tmp_path.glob(f"cache/*/shard-{shard:06d}.tar")), (shard, shard))
    shards.fetch(1)
    shards.fetch(7)
    # 0 is the oldest, but held; 1 has been used since; so 2 goes.
    assert tars_in(tmp_path / "cache") == [f"shard-{number:06d}.tar" for number in (0, 1, 7)]
    holder.close()
    shards.fetch(8)
    assert tars_in(tmp_path / "cache") == [f"shard-{number:06d}.tar" for number in (1, 7, 8)]


def test_a_full_cache_is_told_with_its_numbers(store, local, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_WAIT_FOR_ROOM_S", 0.1)
    shards = open_cached(tmp_path / "cache", shards=2, local=local)
    holder = Holder(shards.folder)
    holder.hold({shards.cached_name(shard) for shard in range(2)})
    shards.fetch(0)
    shards.fetch(1)
    with pytest.raises(
        CacheFullError, match=r"no room for s3://bucket/set/shard-000002\.tar .*raise --data\.cache-gib"
    ):
        shards.fetch(2)
    holder.close()
    shards.fetch(2)


FETCH = """
import sys, pickle
shards = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True)
sys.stdin.readline()
for shard in range(shards.num_shards):
    shards.fetch(shard)
"""


def fetching(shards: CachedShardSet, path: Path) -> subprocess.Popen:
    import pickle

    path.write_bytes(pickle.dumps(shards))
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen) -> int:
    process.stdout.close()
    if not process.stdin.closed:
        process.stdin.close()
    return process.wait(timeout=60)


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_download_each_shard_once(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", local=local)
    processes = [fetching(shards, tmp_path / "shards.pickle") for _ in range(2)]
    for process in processes:
        go(process)
    assert [finish(process) for process in processes] == [0, 0]
    assert tars_read(store) == [f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
    assert_same(shards, open_set(local))


def test_after_a_kill_in_mid_download_nothing_is_in_the_way(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", local=local)
    store.fault, store.remaining = "stall", 10**6
    process = fetching(shards, tmp_path / "shards.pickle")
    go(process)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("cache/*/*.part")) or not tars_read(store):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    process.kill()
    assert finish(process) == -9
    assert tars_in(tmp_path / "cache") == []
    store.remaining = 0
    # The shard it was at is fetched by whoever needs it, and what nobody needs any more is swept away.
    left = next(tmp_path.glob("cache/*/*.part"))
    shards.fetch(5)
    assert left.exists()
    Holder(shards.folder).close()
    assert not left.exists()
    assert_same(shards, open_set(local))


def test_the_coming_steps_are_fetched_ahead_in_their_order_within_the_share(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", shards=4.5, local=local)
    steps = ListedSteps(samples=np.arange(NUM_SHARDS * PER_SHARD), batch_size=4, epoch=0)
    walk = FetchedSteps(shards, steps)
    try:
        taken = [next(walk)]
        deadline = time.monotonic() + 30
        while len(tars_in(tmp_path / "cache")) < 4:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        assert tars_in(tmp_path / "cache") == [f"shard-{number:06d}.tar" for number in range(4)]
        for step in walk:
            taken.append(step)
            shards.fetch(int(step[1][0]) // PER_SHARD)
            assert len(tars_in(tmp_path / "cache")) <= 4
    finally:
        walk.close()
    assert len(taken) == NUM_SHARDS * PER_SHARD // 4
    assert np.concatenate([samples for _, samples in taken]).tolist() == list(range(NUM_SHARDS * PER_SHARD))
    # Each shard once: what is about to be used is not thrown out.
    assert tars_read(store) == [f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
    assert not list(tmp_path.glob("cache/*.held"))


def walk_all(shards):
    """Take the steps, one for each shard, as a reader does."""
    walk = FetchedSteps(shards, ListedSteps(samples=np.arange(NUM_SHARDS * PER_SHARD), batch_size=PER_SHARD, epoch=0))
    try:
        for _, samples in walk:
            shards.fetch(int(samples[0]) // PER_SHARD)
    finally:
        walk.close()


def test_each_node_fetches_the_shards_of_its_lanes_once_an_epoch(store, local, tmp_path):
    num_nodes, batch_size = 2, 8
    sizes = open_set("s3://bucket/set").shard_sizes
    order = OrderPlan(shard_sizes=sizes, seed=1, batch_size=batch_size, lanes=num_nodes, window_shards=2).order(0)
    fetched = []
    for node in range(num_nodes):
        samples = np.concatenate([order.rank_step(step, node, num_nodes) for step in range(order.plan.num_steps)])
        wanted = {f"shard-{shard:06d}.tar" for shard in order.locate(samples)[0].tolist()}
        # About half of what the node needs in an epoch.
        shards = open_cached(tmp_path / f"node-{node}", shards=len(wanted) / 2 + 1, local=local)
        store.reads.clear()
        walk = FetchedSteps(shards, ListedSteps(samples=samples, batch_size=batch_size // num_nodes, epoch=0))
        try:
            for _, some in walk:
                for shard in np.unique(order.locate(some)[0]).tolist():
                    shards.open_shard(shard)
        finally:
            walk.close()
        assert tars_read(store) == sorted(wanted)
        fetched += wanted
    # Shared are those that an end of a lane cuts through.
    assert NUM_SHARDS <= len(fetched) <= NUM_SHARDS + num_nodes


def test_as_many_shards_are_fetched_at_once_as_is_said(store, local, tmp_path):
    shards = open_cached(tmp_path / "cache", local=local, fetchers=(6, 6))
    store.together = threading.Barrier(6)
    walk_all(shards)
    assert len(tars_read(store)) == NUM_SHARDS
    assert store.together.n_waiting == 0


def test_fetchers_become_more(store, local, tmp_path, monkeypatch):
    class Growing(Pace):
        def note(self, num_bytes, now_s):
            self.num_fetchers = 4

    monkeypatch.setattr(fetch_module, "Pace", Growing)
    # This thread fetches, too, what it needs and is not there yet.
    store.together, store.alone = threading.Barrier(4), 4
    walk_all(open_cached(tmp_path / "cache", local=local, fetchers=(1, 8)))
    assert len(tars_read(store)) == NUM_SHARDS


def batches(shards, tmp_path, *, state=None, num=10**6, cache_gib=None, **options) -> list[str]:
    data = DataConfig(
        shards=str(shards),
        batch_size=4,
        num_threads=1,
        lanes=2,
        window_shards=1,
        cache=str(tmp_path / "cache"),
        cache_gib=cache_gib,
        **options,
    )
    found = []
    with open_loader(data, ViewsConfig(size=16), seed=4, device=CPU) as loader:
        if state:
            loader.load_state_dict(state)
        while loader.state_dict()["epoch"] < 2 and len(found) < num:
            for batch in loader:
                content = b"".join(t.contiguous().numpy().tobytes() for t in (*batch.views, batch.index))
                found.append(hashlib.sha256(content).hexdigest())
                if len(found) == num:
                    break
    return found


@pytest.mark.parametrize("backend", ["dali", pytest.param("torch", marks=pytest.mark.slow)])
def test_batches_through_a_tight_cache_are_those_of_local_shards_to_the_bit(store, local, tmp_path, backend):
    expected = batches(local, tmp_path, backend=backend)
    # Two lanes of four shards each, in three quarters.
    tight = 11 * tar_bytes(local) / (1 << 30)
    found = batches("s3://bucket/set", tmp_path, backend=backend, cache_gib=tight, num=30)
    assert len(tars_in(tmp_path / "cache")) <= 11
    assert len(tars_read(store)) > len(tars_in(tmp_path / "cache"))
    found += batches("s3://bucket/set", tmp_path, backend=backend, cache_gib=tight, state={"epoch": 0, "step": 30})
    assert found == expected
    assert len(tars_in(tmp_path / "cache")) <= 11
    # The reader process ends like a killed one; the next to come sweeps up, and finds no lock in its way.
    CacheFolder(path=tmp_path / "cache", budget_bytes=0, share_bytes=0).sweep()
    assert not [*tmp_path.glob("cache/*.held"), *tmp_path.glob("cache/*/*.part")]


def test_a_cache_that_is_too_small_is_refused_with_the_arithmetic(store, local, tmp_path):
    with pytest.raises(
        ValueError, match=r"1 ranks here x 2 lanes x 4 shards of a window x .* raise --data\.cache-gib to"
    ):
        batches("s3://bucket/set", tmp_path, cache_gib=3 * tar_bytes(local) / (1 << 30))
    data = DataConfig(shards="s3://bucket/set", cache=str(tmp_path), cache_gib=tar_bytes(local) / (1 << 30))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot make the folder \S+ for shards .*--data\.cache"):
        batches("s3://bucket/set", tmp_path / "file")
    with pytest.raises(ValueError, match="too little for evaluation"):
        open_central("s3://bucket/set", size=16, batch_size=8, data=data)


def test_evaluation_and_a_shard_that_never_comes(store, local, tmp_path):
    data = DataConfig(shards="s3://bucket/set", cache=str(tmp_path / "cache"))
    loader = open_central("s3://bucket/set", size=16, batch_size=40, data=data, backend="dali")
    assert torch.cat([batch.index for batch in loader]).tolist() == list(range(NUM_SHARDS * PER_SHARD))
    assert len(tars_in(tmp_path / "cache")) == NUM_SHARDS
    loader.close()
    store.refused = "shard-000023.tar"
    data = DataConfig(shards="s3://bucket/set", cache=str(tmp_path / "other"))
    loader = open_central("s3://bucket/set", size=16, batch_size=40, data=data, backend="dali")
    with pytest.raises(ValueError, match=r"cannot read s3://bucket/set/shard-000023\.tar"):
        list(loader)
    loader.close()


class Counted:
    """Steps without end over half of the shards, three to an epoch; notes how far they were walked."""

    num_steps = 3
    shards_in_use = 1
    walked = 0

    def __iter__(self):
        for self.walked in itertools.count(1):
            yield 0, np.arange(4) + self.walked % 12 * PER_SHARD


def test_a_walk_is_an_epoch_ahead_at_most_where_the_cache_holds_the_set(store, local, tmp_path):
    shards, steps = open_cached(tmp_path / "cache", local=local), Counted()
    ahead = _Ahead(shards, steps)
    try:
        for taken in range(1, 40):
            ahead.advance()
            deadline = time.monotonic() + 30
            # The last step that is walked waits to be admitted.
            while steps.walked < taken + steps.num_steps + 2:
                assert time.monotonic() < deadline
                threading.Event().wait(0.001)
            assert steps.walked == taken + steps.num_steps + 2
    finally:
        ahead.close()
