import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import astuple
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import VIEWS, central_crop
from pipelines.plan.draw import draw_views
from pipelines.plan.order import OrderPlan
from pipelines.plan.steps import EpochSteps, ListedSteps
from pipelines.reading.read_process import ReadingSpec
from pipelines.reading.readahead import ReadAhead
from pipelines.reading.reader import DamagedSampleError, Reader
from pipelines.world import World
from shards.ground.channel import ChannelClosed
from shards.ground.child import WorkerDiedError
from shards.sets import open_set
from tests.pipelines.shard_files import write_shards

PAYLOADS = [bytes([number]) * (50 + 37 * number) for number in range(60)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 samples that are no images at all: the reader does not care."""
    labels = list(range(60))
    return open_set(write_shards(tmp_path_factory.mktemp("odd") / "set", PAYLOADS, per_shard=7, labels=labels))


def reading(shards, samples, *, batch_size=8, ahead=2, skip=False) -> ReadAhead:
    steps = ListedSteps(samples=np.asarray(samples), batch_size=batch_size, epoch=3)
    draw = partial(draw_views, views=central_crop(8, side=1.0), seed=0)
    spec = ReadingSpec(
        shards=shards, steps=steps, draw=draw, max_batch=batch_size, ahead=ahead, num_threads=2, skip=skip
    )
    return ReadAhead(spec)


def test_a_folder_of_the_same_name_where_we_are_started_is_not_taken_for_ours(shards, tmp_path, monkeypatch):
    for name in ("pipelines", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    batches = reading(shards, range(8))
    assert next(batches).samples.tolist() == list(range(8))
    batches.close()


def test_batches_hold_the_bytes_and_tables_of_their_samples_in_order(shards):
    samples = np.random.default_rng(0).permutation(60)
    batches = reading(shards, samples)
    reader = Reader(shards)
    kept = []
    for begin, batch in zip(range(0, 60, 8), batches, strict=True):
        mine = samples[begin : begin + 8]
        assert batch.samples.tolist() == batch.labels.tolist() == batch.keys.tolist() == mine.tolist()
        [expected] = draw_views(3, mine, reader.records(mine), views=central_crop(8, side=1.0), seed=0)
        assert np.array_equal(batch.tables[0].box, expected.box)
        kept.append(batch)
    # All are held: each is in memory of its own.
    assert [bytes(image) for batch in kept for image in batch.encoded] == [PAYLOADS[sample] for sample in samples]
    with pytest.raises(StopIteration):
        next(batches)
    reader.close()
    batches.close()
    assert bytes(kept[-1].encoded[-1]) == PAYLOADS[samples[-1]]


def test_steps_drawn_together_have_the_tables_of_their_own_epoch(shards):
    plan = OrderPlan(shard_sizes=shards.shard_sizes, seed=1, batch_size=9, lanes=2, window_shards=1)
    steps = EpochSteps(plan=plan, epoch=5, step=4, world=World())
    draw = partial(draw_views, views=VIEWS["moco-v3"].specs, seed=2)
    batches = ReadAhead(
        ReadingSpec(shards=shards, steps=steps, draw=draw, max_batch=9, ahead=2, num_threads=1, skip=False)
    )
    reader = Reader(shards)
    # More steps than are drawn in one call, over the ends of epochs.
    for (epoch, samples), batch in zip(islice(steps, 40), batches, strict=False):
        assert np.array_equal(batch.samples, samples)
        for found, expected in zip(batch.tables, draw(epoch, samples, reader.records(samples)), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(astuple(found), astuple(expected), strict=True))
    reader.close()
    batches.close()


def test_an_index_that_cannot_be_read_is_told_after_the_batches_before_it(tmp_path):
    shards = open_set(write_shards(tmp_path / "set", PAYLOADS, per_shard=20))
    (shards.path / "shard-000002.index.npy").unlink()
    batches = reading(shards, np.arange(60), batch_size=10)
    assert [next(batches).samples[0] for _ in range(4)] == [0, 10, 20, 30]
    with pytest.raises(ValueError, match=r"cannot read the index .*shard-000002"):
        next(batches)
    batches.close()


def test_memory_is_used_again_once_a_batch_is_dropped(shards):
    batches = reading(shards, np.arange(60), batch_size=1)
    for number, batch in enumerate(batches):
        assert bytes(batch.encoded[0]) == PAYLOADS[number]
    # Two under way, one with us, one on its way back.
    assert len(batches._slots) <= 5
    batches.close()


def test_one_sample_of_a_batch_keeps_its_memory(shards):
    batches = reading(shards, np.arange(60), batch_size=1)
    kept = next(batches).encoded[0]
    gc.collect()
    for _ in batches:
        pass
    assert bytes(kept) == PAYLOADS[0]
    batches.close()


def flip(shards, sample) -> None:
    path = shards.shard_path(sample // 7)
    content = bytearray(path.read_bytes())
    content[int(shards.index(sample // 7)[sample % 7]["offset"]) + 5] ^= 4
    path.write_bytes(content)


def test_damaged_samples_are_named_after_the_batches_before_them_or_replaced(tmp_path):
    shards = open_set(write_shards(tmp_path / "set", PAYLOADS, per_shard=7))
    flip(shards, 20)
    flip(shards, 21)
    batches = reading(shards, np.arange(60))
    assert [next(batches).samples[0] for _ in range(2)] == [0, 8]
    with pytest.raises(DamagedSampleError, match=r"shard-000002\.tar: sample 20 \(key 20.*crc32c") as caught:
        next(batches)
    assert "in the reader process" in caught.value.__notes__[0]
    batches.close()
    batches = reading(shards, np.arange(16, 32), skip=True)
    batch = next(batches)
    expected = [16, 17, 18, 19, 22, 22, 22, 23]
    assert batch.samples.tolist() == expected
    assert [bytes(image) for image in batch.encoded] == [PAYLOADS[sample] for sample in expected]
    assert len(batch.replaced) == 2
    batches.close()


def test_an_index_of_another_set_is_told(tmp_path):
    shards = open_set(write_shards(tmp_path / "set", PAYLOADS, per_shard=60))
    path = shards.path / "shard-000000.index.npy"
    records = np.load(path)
    records["size"] = 1 << 30
    np.save(path, records)
    batches = reading(shards, np.arange(60))
    with pytest.raises(ValueError, match=r"shard-000000\.tar: its index has larger samples than manifest\.json"):
        next(batches)
    batches.close()


@pytest.mark.faults
def test_a_killed_reader_process_is_told_within_seconds(shards):
    batches = reading(shards, np.arange(60), batch_size=1)
    next(batches)
    batches._child.process.send_signal(signal.SIGSTOP)
    threading.Timer(0.2, batches._child.process.kill).start()
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"reader process \d+ was killed by SIGKILL: .* out of memory"):
        for _ in batches:
            pass
    assert time.monotonic() - begin < 10
    batches.close()


@pytest.mark.faults
def test_who_waits_is_released_when_interrupted(shards):
    batches = reading(shards, np.arange(60), batch_size=1)
    batches._child.process.send_signal(signal.SIGSTOP)
    threading.Timer(0.2, batches.interrupt).start()
    with pytest.raises(ChannelClosed):
        for _ in batches:
            pass
    batches._child.process.send_signal(signal.SIGCONT)
    batches.close()
    assert batches._child.process.returncode is not None


PARENT = """
import os, sys, time
from tests.pipelines.test_readahead import reading
from shards.sets import open_set
batches = reading(open_set(sys.argv[1]), range(60), batch_size=1)
next(batches)
print(batches._child.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.faults
def test_nothing_is_left_of_the_reader_when_its_parent_is_killed(shards):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path]))}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(shards.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    child = int(parent.stdout.readline())
    descriptor = os.pidfd_open(child)
    try:
        parent.kill()
        parent.wait()
        # A pidfd is readable once its process is gone.
        import select

        assert select.select([descriptor], [], [], 10)[0]
    finally:
        os.close(descriptor)
        parent.stdout.close()
