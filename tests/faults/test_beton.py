"""`make-shards beton` killed, and its workers."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.beton import verify_beton
from tests.faults.test_packer import alive, children, wait_until
from tests.shards.pictures import fill

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stuck(tmp_path):
    """A `make-shards beton` whose worker waits for ever for the bytes of a shard, and that shard's true bytes."""
    source = fill(tmp_path / "in", 8)
    pack(PackConfig(sources=(str(source),), out=str(tmp_path / "shards"), shard_samples=2, workers=1))
    shard = tmp_path / "shards" / "shard-000001.tar"
    data = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    process = subprocess.Popen(
        [*command(tmp_path), "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = []

    def has_started():
        workers[:] = children(process.pid)
        return len(workers) == 2 and (tmp_path / ".x.beton.partial").exists()

    try:
        wait_until(has_started)
        yield process, workers, shard, data
    finally:
        for pid in (process.pid, *workers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def command(folder):
    return [sys.executable, "-m", "shards.cli", "beton", folder / "shards", "--out", folder / "x.beton"]


def put_back(shard, data):
    shard.unlink()
    shard.write_bytes(data)


def check_the_next_run(folder):
    result = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert verify_beton(folder / "x.beton", decode=True) == []
    assert open_set(folder / "x.beton").num_samples == 8
    assert {path.name for path in folder.iterdir()} == {"in", "shards", "x.beton"}


def test_a_killed_worker_ends_the_command_which_leaves_nothing_behind(stuck, tmp_path):
    process, workers, shard, data = stuck
    os.kill(workers[0], signal.SIGKILL)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(r"a worker process \d+ was killed by SIGKILL", message)
    wait_until(lambda: not any(alive(pid) for pid in workers), 10)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "shards"}
    put_back(shard, data)
    check_the_next_run(tmp_path)


def test_an_interrupt_leaves_nothing_behind(stuck, tmp_path):
    process, workers, _, _ = stuck
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_until(lambda: not any(alive(pid) for pid in workers), 10)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "shards"}


def test_a_killed_command_leaves_no_file_under_the_name_and_no_worker(stuck, tmp_path):
    process, workers, shard, data = stuck
    process.kill()
    process.wait()

    def has_ended():
        # Whoever waits for the shard learns that it has no bytes.
        with suppress(OSError):
            os.close(os.open(shard, os.O_WRONLY | os.O_NONBLOCK))
        return not any(alive(pid) for pid in workers)

    wait_until(has_ended, 10)
    assert not (tmp_path / "x.beton").exists()
    put_back(shard, data)
    check_the_next_run(tmp_path)
