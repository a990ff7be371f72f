import gc
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.backends.pixels import decode, render
from pipelines.backends.torch import WorkerDiedError
from pipelines.config import DataConfig, ViewConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.plan.draw import draw_views
from pipelines.reading.reader import Reader
from shards.sets import open_set
from tests.pipelines.central import open_central
from tests.pipelines.shard_files import damaged_copy

VIEWS = ViewsConfig(size=24, query=ViewConfig(), key=ViewConfig(solarize_p=0.5))
CPU = torch.device("cpu")


def open_torch(shards, *, num_workers=1):
    data = DataConfig(shards=str(shards), batch_size=16, num_threads=num_workers, backend="torch")
    return open_loader(data, VIEWS, seed=3, device=CPU)


def children() -> list[int]:
    """Living worker processes of this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid() and "pipelines.backends.view_process" in command:
                found.append(int(entry.name))
    return found


def same(one, two) -> bool:
    of_one, of_two = ((*batch.views, batch.index, batch.label) for batch in (one, two))
    return all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


def test_two_epochs_a_seek_and_a_clean_end(small_shards):
    loader = open_torch(small_shards, num_workers=2)
    assert "torch (as asked for), 2 processes" in loader.description
    copies = []
    whole = []
    for _ in range(2):
        for batch in loader:
            for view in batch.views:
                assert view.shape == (16, 3, 24, 24)
                assert view.dtype == torch.uint8
                assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.index, batch.label)
            whole.append(batch)
            copies.append((batch.views[0].clone(), batch.views[1].clone()))
    # Batches that are held are not written to again; with all twelve held there are as many slots.
    assert all(
        torch.equal(b.views[0], q) and torch.equal(b.views[1], k) for b, (q, k) in zip(whole, copies, strict=True)
    )
    assert len(loader._stream._ring._descriptors) >= 12
    loader.load_state_dict({"epoch": 1, "step": 2})
    assert all(same(a, b) for a, b in zip(loader, whole[8:], strict=True))
    assert len(children()) == 2
    # A loader that is dropped closes itself.
    del loader
    gc.collect()
    assert children() == []
    assert torch.equal(whole[0].views[0], copies[0][0])


def test_slots_are_used_again_and_pixels_are_nearly_those_of_dali(small_shards):
    with open_torch(small_shards) as loader:
        for _ in range(5):
            for batch in loader:
                assert batch.views[0].shape[0] == 16
        # Three under way or ready, one with the consumer, one just dropped.
        assert len(loader._stream._ring._descriptors) <= 5

        data = DataConfig(shards=str(small_shards), batch_size=16, num_threads=2, backend="dali")
        two = open_loader(data, VIEWS, seed=3, device=CPU)
        two.load_state_dict(loader.state_dict())
        for a, b in zip(loader, two, strict=True):
            assert torch.equal(a.index, b.index)
            inner = slice(4, -4)
            difference = (a.views[0].int() - b.views[0].int()).abs()[:, :, inner, inner].float()
            # The blur carries inwards what the two read differently beyond the crop's border.
            assert difference.mean() < 0.5
            assert difference.max() <= 8
        two.close()


def test_the_workers_apply_the_linear_map_where_it_is_asked_for(small_shards):
    views = ViewsConfig(size=24, query=VIEWS.query, key=VIEWS.key, color="linear")
    data = DataConfig(shards=str(small_shards), batch_size=16, num_threads=1, backend="torch")
    with open_loader(data, views, seed=3, device=CPU) as loader:
        batch = next(iter(loader))
    shards = open_set(small_shards)
    reader = Reader(shards, num_threads=1)
    samples = batch.index.numpy()
    records = reader.records(samples)
    images = [decode(encoded) for encoded in reader.submit(samples, records).result()]
    reader.close()
    tables = draw_views(0, samples, records, views=views.specs, seed=3)
    assert all(table.matrix is not None for table in tables)
    for table, made in zip(tables, batch.views, strict=True):
        for row, image in enumerate(images):
            expected = np.empty((24, 24, 3), dtype=np.uint8)
            render(image, table, row, expected)
            assert np.array_equal(made[row].permute(1, 2, 0).numpy(), expected)


def test_evaluation_with_a_short_last_batch(small_shards):
    loader = open_central(str(small_shards), size=20, batch_size=30, backend="torch")
    batches = list(loader)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(100))
    assert [len(batch.views[0]) for batch in batches] == [30, 30, 30, 10]
    assert all(torch.equal(batch.label, batch.index) for batch in batches)
    assert children() == []


@pytest.mark.faults
def test_a_worker_that_is_killed_is_told(small_shards):
    loader = open_torch(small_shards)
    next(iter(loader))
    os.kill(children()[0], signal.SIGKILL)

    def consume():
        for _ in range(100):
            list(loader)

    with pytest.raises(WorkerDiedError, match=r"worker process \d+ was killed by SIGKILL"):
        consume()
    loader.close()
    assert children() == []


@pytest.mark.faults
def test_a_damaged_image_is_named(small_shards, tmp_path):
    loader = open_torch(damaged_copy(small_shards, tmp_path / "broken", shard=2, sample=7))
    with pytest.raises(ValueError, match=r"shard-000002\.tar: sample 57 .*crc32c"):
        list(loader)
    loader.close()
    assert children() == []


SCRIPT = """
import os, sys, torch
from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
loader = open_loader(DataConfig(shards=sys.argv[1], batch_size=16, backend="torch", num_threads=1),
                     ViewsConfig(size=16), seed=0, device=torch.device("cpu"))
batch = next(iter(loader))
print(loader._stream._workers[0].child.process.pid, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.faults
@pytest.mark.parametrize(("how", "code"), [("leave", 0), ("kill", -9)])
def test_workers_end_with_their_loaders_process_however_it_ends(small_shards, how, code):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(small_shards), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        worker = os.pidfd_open(pid)
        # The worker holds the script's standard error too: its end is the end of this stream.
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == code
    assert select.select([worker], [], [], 60)[0]
    os.close(worker)
