import os
import subprocess
import sys

import pytest

from shards.ground.errors import InUseError
from shards.ground.locks import locked, open_locked, remove_unlocked, take_lock

HOLD = """
import sys
from pathlib import Path
from shards.ground.locks import locked
with locked(Path(sys.argv[1]), holder="the set", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock until its standard input ends."""
    started = []

    def start(path, how):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_keeps_others_out_names_its_owner_and_dies_with_it(tmp_path, holder):
    path = tmp_path / "lock"
    other = holder(path, "alone")
    with pytest.raises(InUseError, match=rf"^the folder is in use by another process \(process {other.pid} on "):
        take_lock(path, holder="the folder")
    assert not remove_unlocked(path)
    other.kill()
    other.wait()
    with locked(path, holder="the folder"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_shared_locks_go_together_and_keep_out_who_wants_it_alone(tmp_path, holder):
    path = tmp_path / "lock"
    holder(path, "shared")
    with locked(path, holder="the folder", shared=True):
        pass
    with pytest.raises(InUseError, match="its owner is not known"), locked(path, holder="the folder"):
        pass


def test_a_lock_that_is_only_opened_keeps_what_the_file_holds(tmp_path):
    path = tmp_path / "held"
    path.write_text("names")
    os.close(open_locked(path, holder="the cache", wait=True))
    assert path.read_text() == "names"
    assert remove_unlocked(path)
    assert not path.exists()
    assert remove_unlocked(path)
