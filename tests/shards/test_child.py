import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.ground.channel import ChannelClosed
from shards.ground.child import WorkerDiedError, start_children
from shards.ground.errors import PackError, RefusedError, Rejected, portable
from shards.ground.pool import run_tasks

MODULE = "tests.shards.answering_child"


@pytest.fixture
def child():
    # A spec larger than any socket's buffer: starting does not wait for the child to read it.
    [started] = start_children(MODULE, {"spec": bytes(1 << 22)}, what="test process")
    yield started
    started.kill()


def test_children_share_one_spec_and_end_with_their_connection():
    children = start_children(MODULE, ("spec", 3), count=2, what="test process")
    assert [child.receive() for child in children] == [("ready", ("spec", 3), "1", True)] * 2
    for child in children:
        child.close()
    assert [child.process.returncode for child in children] == [0, 0]


def test_arrays_of_a_spec_are_shared_until_a_child_writes():
    spec = np.arange(100_000)
    children = start_children(MODULE, spec, count=2, what="test process")
    assert all(np.array_equal(child.receive()[1], spec) for child in children)
    # What one writes, no one else sees.
    for child in children:
        child.send("write")
        assert np.array_equal(child.receive(), spec + 1)
    for child in children:
        child.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_the_parent_s(child, number):
    child.receive()
    child.process.send_signal(number)
    child.send("threads")
    assert child.receive() >= 1


def test_an_error_is_raised_with_the_traceback_of_its_process(child):
    child.receive()
    child.send("such thing")
    with pytest.raises(ValueError, match=r"^no such thing\nin a child:") as caught:
        child.receive()
    [note] = caught.value.__notes__
    assert note.startswith("in a child:\nTraceback")
    assert "answering_child.py" in note
    assert 'raise ValueError(f"no {message}")' in note


def test_an_error_that_cannot_be_sent_is_named(child):
    child.receive()
    child.send("unsendable")
    with pytest.raises(RuntimeError, match=r"^UnsendableError: a\nin a child:") as caught:
        child.receive()
    assert "raise UnsendableError" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [Rejected("damaged", "cut"), RefusedError("no", "403 Forbidden"), PackError("full")])
def test_our_own_errors_cross_as_they_are(error):
    same = pickle.loads(pickle.dumps(portable(error, "there")))
    assert (type(same), same.args, vars(same)) == (type(error), error.args, vars(error))


@pytest.mark.faults
def test_a_child_that_exits_or_is_killed_is_told_with_how(child):
    child.receive()
    child.send("exit")
    with pytest.raises(WorkerDiedError, match=rf"^test process {child.process.pid} ended with exit code 7$"):
        child.receive()
    [killed] = start_children(MODULE, None, what="test process")
    killed.process.kill()
    with pytest.raises(WorkerDiedError, match=r"was killed by SIGKILL: the machine may have run out of memory$"):
        all(killed.receive() for _ in range(2))
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        killed.send("anything")
    killed.close()


@pytest.mark.faults
def test_who_waits_for_a_stopped_child_is_released_when_it_is_interrupted(child):
    child.receive()
    child.process.send_signal(signal.SIGSTOP)
    waiter = threading.Timer(0.1, child.interrupt)
    waiter.start()
    with pytest.raises(ChannelClosed):
        child.receive()
    waiter.join()
    child.process.send_signal(signal.SIGCONT)


@pytest.mark.faults
def test_a_child_does_not_outlive_its_parent():
    code = f"from shards.ground.child import start_children as s; c = s({MODULE!r}, 1, what='x')[0]; c.receive()"
    parent = subprocess.run(
        [sys.executable, "-c", f"{code}; import os; print(c.process.pid); os.kill(os.getpid(), 9)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert parent.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_running(int(parent.stdout)):
        assert time.monotonic() < deadline, "still there"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def square(task, tick):
    for _ in range(task):
        tick(1, 10)
    if task == 13:
        raise Rejected("unlucky", "thirteen")
    return task**2


@settings(max_examples=6, deadline=None)
@given(tasks=st.lists(st.integers(0, 12), max_size=9), workers=st.integers(1, 3))
def test_every_task_is_done_once_and_every_input_is_counted(tasks, workers):
    seen = []
    results = list(run_tasks(square, tasks, workers=workers, tick=lambda *done: seen.append(done)))
    assert sorted(results) == sorted((task, task**2) for task in tasks)
    assert [sum(column) for column in zip((0, 0), *seen, strict=True)] == [sum(tasks), 10 * sum(tasks)]


def test_a_jobs_error_ends_the_pool_and_carries_its_traceback():
    with pytest.raises(Rejected) as caught:
        list(run_tasks(square, [1, 13, 2, 3], workers=2, tick=lambda *done: None))
    assert (caught.value.reason, caught.value.detail) == ("unlucky", "thirteen")
    assert "in a worker process:\nTraceback" in caught.value.__notes__[0]
