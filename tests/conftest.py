import os
import pickle
import signal
import time
import urllib.request
from contextlib import suppress
from multiprocessing.connection import Listener, wait
from pathlib import Path

import pytest
from hypothesis import settings

from tests.warm import WarmPython

ROOT = Path(__file__).parent.parent

# No test has a threshold of time: a busy machine would fail it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background makes them ignore it, and the commands that they start inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Begun first, so that all workers end at about the same time.
LONGEST_FILES = ("test_fake_cuda", "test_gpu_check", "test_loop", "test_export")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST_FILES)


class RankFailedError(Exception):
    """What a rank raised, with its traceback."""


class UnconnectedError(RankFailedError):
    """What gloo raised in place of connecting the ranks."""


# Seen once in some thousand groups, on a busy machine: gloo's "Connection closed by peer" while it connects.
_CONNECTING_TRIES = 3


class Ranks:
    """Processes that are ranks of gloo worlds on this machine; they are started once and used by many tests."""

    def __init__(self, folder, python):
        self._folder = folder
        self._python = python
        self._workers = []
        self._num_jobs = 0

    def __call__(self, function, *arguments, world_size=2, timeout_s=120):
        """What `function(*arguments)` returns on each rank of a fresh process group, in the order of ranks.

        `function` is a module-level function of a test file. Raises the first failing rank's error.
        """
        for _ in range(_CONNECTING_TRIES - 1):
            with suppress(UnconnectedError):
                return self._run(function, arguments, world_size, timeout_s)
        return self._run(function, arguments, world_size, timeout_s)

    def _run(self, function, arguments, world_size, timeout_s):
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        store = self._folder / f"store-{self._num_jobs}"
        self._num_jobs += 1
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            job = {"path": function.__code__.co_filename, "function": function.__name__, "arguments": arguments}
            world = {"rank": rank, "world_size": world_size, "store": str(store), "timeout_s": timeout_s}
            connection.send_bytes(pickle.dumps(job | world))
        return self._collect(connections, time.monotonic() + timeout_s)

    def _collect(self, connections, deadline):
        results, errors, error_type = {}, [], RankFailedError
        while waiting := [rank for rank in range(len(connections)) if rank not in results]:
            ready = wait([connections[rank] for rank in waiting], timeout=max(0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"ranks {waiting} did not return")
                break
            for rank in (connections.index(connection) for connection in ready):
                kind, results[rank] = self._receive(rank)
                if kind == "unconnected":
                    error_type = UnconnectedError
                if kind != "result":
                    errors.append(f"rank {rank}:\n{results[rank]}")
                    # The others may wait for this one in a collective.
                    deadline = min(deadline, time.monotonic() + 5)
        if errors:
            # What a failure left behind in any of them would meet the next test.
            for rank in range(len(connections)):
                self._stop(*self._workers[rank])
                self._workers[rank] = self._start()
            raise error_type(errors[0])
        return [results[rank] for rank in range(len(connections))]

    def _receive(self, rank):
        try:
            return pickle.loads(self._workers[rank][1].recv_bytes())
        except EOFError:
            return "error", "the process died"

    def _start(self):
        one_thread = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with Listener() as listener:
            env = os.environ | one_thread
            process = self._python.start("-m", "tests.rank_worker", listener.address, env=env, cwd=ROOT)
            return process, listener.accept()

    @staticmethod
    def _stop(process, connection):
        process.kill()
        process.wait()
        connection.close()

    def close(self):
        for process, connection in self._workers:
            self._stop(process, connection)
        self._workers.clear()


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory, warm_python):
    """Run a function on several gloo ranks: `run_ranks(function, *arguments, world_size=2)`."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), warm_python)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def warm_python():
    """Run Python in processes that have torch already: `warm_python.run("-m", module, *words)`, or `start`."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture
def fresh_accelerator():
    """Accelerate as in a new process, now and for the next test: it keeps the first precision that a process asks for.

    Ask for it before monkeypatch: what that puts back must not meet a state that was reset before.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def server():
    """An S3 server on this machine; gives its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """A fresh bucket; gives its address."""
    from shards.storage import stores as storage

    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    for key, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    for cached in (storage.open_folder, storage._open_remote):
        cached.cache_clear()
    yield f"s3://{name}"
    for cached in (storage.open_folder, storage._open_remote):
        cached.cache_clear()
