"""Child processes: how one starts, what it is sent, what it answers, and how it ends.

A child runs `main(connection, spec)` of a module in a fresh interpreter: a fork would inherit the threads' locks, and
torch's and CUDA's state. The spec comes pickled in shared memory, so starting never waits for the child; its arrays
stay there, one copy for all children, and what a child writes into them no one else sees. After that both sides send
messages over the connection; an Exception that the child sends is raised where its message is received
(`Child.receive`). A child ends when the other end of its connection is closed.
"""

import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shards.ground.channel import ChannelClosed
from shards.ground.memory import create_shared

__all__ = ["Child", "WorkerDiedError", "serve", "start_children"]

_PATIENCE_S = 5
_ALIGNED = 64


class WorkerDiedError(RuntimeError):
    """A child process ended although it was not asked to.

    Args:
        what: what it was.
        returncode: as Popen's: its exit code, or the signal that ended it as a negative number.
    """

    def __init__(self, what: str, returncode: int) -> None:
        self.returncode = returncode
        self.how = f"ended with exit code {returncode}"
        if returncode < 0:
            hint = ": the machine may have run out of memory" if returncode == -signal.SIGKILL else ""
            self.how = f"was killed by {signal.Signals(-returncode).name}{hint}"
        super().__init__(f"{what} {self.how}")


class Child:
    """One child process, seen from its parent. `interrupt` may be called from any thread.

    Args:
        process: the process.
        connection: our end of its connection.
        what: what to call it in errors, such as `worker process`.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", connection: "Connection[Any, Any]", what: str) -> None:
        self.process = process
        self.connection = connection
        self._what = what
        self._is_interrupted = False

    def send(self, message: object) -> None:
        """Send a message.

        Raises:
            WorkerDiedError: the process is gone.
            ChannelClosed: interrupted.
        """
        try:
            self.connection.send(message)
        except OSError:
            raise self.gone() from None

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            Exception: what went wrong in the process.
            WorkerDiedError: the process is gone.
            ChannelClosed: interrupted.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self.gone() from None
        if isinstance(message, Exception):
            raise message
        return message

    def gone(self) -> Exception:
        """Wait for a process whose connection has broken, and return the error that says how it ended."""
        if self._is_interrupted:
            return ChannelClosed()
        self._wait()
        return WorkerDiedError(f"{self._what} {self.process.pid}", self.process.returncode)

    def interrupt(self) -> None:
        """Break the connection, which ends the process, and let threads that wait for a message raise ChannelClosed."""
        self._is_interrupted = True
        # Closing would not wake a thread that reads.
        with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break the connection and wait for the process; kill it if it does not end."""
        self.connection.close()
        self._wait()

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.close()

    def _wait(self) -> None:
        try:
            self.process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_children(module: str, spec: object, *, count: int = 1, what: str) -> list[Child]:
    """Start processes that run `main(connection, spec)` of a module, each with one OpenMP thread.

    Args:
        module: its name.
        spec: pickled once for all of them.
        count: how many.
        what: what to call one in errors.
    """
    memory = create_shared("moco-fast-spec", _pickled(spec))
    children: list[Child] = []
    try:
        children.extend(_start(module, memory, what) for _ in range(count))
    except BaseException:
        for child in children:
            child.kill()
        raise
    finally:
        os.close(memory)
    return children


def _pickled(spec: object) -> bytes:
    """Return how long the pickle and each array are, and then those, at places that suit any number."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(spec, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    head = struct.pack(f"<{1 + len(parts)}q", len(parts), *(part.nbytes for part in parts))
    return b"".join(piece for part in (memoryview(head), *parts) for piece in (part, bytes(-part.nbytes % _ALIGNED)))


def _unpickled(memory: mmap.mmap) -> object:
    """Return a spec whose arrays are in the memory."""
    (count,) = struct.unpack_from("<q", memory)
    sizes = struct.unpack_from(f"<{count}q", memory, 8)
    parts: list[memoryview] = []
    begin = 8 * (1 + count)
    for size in sizes:
        begin += -begin % _ALIGNED
        parts.append(memoryview(memory)[begin : begin + size])
        begin += size
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301 - from our own parent


def _start(module: str, memory: int, what: str) -> Child:
    ours, theirs = Pipe()
    # An empty entry is the current folder. -P keeps Python from putting that first: it may hold another `shards`.
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    call = f"serve({module!r}, {theirs.fileno()}, {memory})"
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-P", "-c", f"from shards.ground.child import serve; {call}"],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return Child(process, ours, what)


def serve(module: str, descriptor: int, memory: int) -> None:
    """Run a module's `main` in a child until the parent is gone; `start_children` calls this there.

    Args:
        module: its name.
        descriptor: of the child's end of the connection.
        memory: descriptor of the shared memory that holds the spec.
    """
    # Ctrl-C, `timeout` and job schedulers signal the whole group of processes: the parent, which saves its state upon
    # that, needs its children until then, and they end with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    main = import_module(module).main
    spec = _unpickled(mmap.mmap(memory, 0, access=mmap.ACCESS_COPY))
    os.close(memory)
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        main(connection, spec)
